"""Other people's trainers on this operator, one file or folder each; each imports its package where it is used.

trl          install() for TRL 0.19 to 1.16
"""
