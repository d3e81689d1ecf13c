"""What does the operator cost beside the bare matrix products that it cannot do without?"""
