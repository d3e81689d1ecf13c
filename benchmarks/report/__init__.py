"""What do the result files say? A page with pictures, the figures of README and docs, and what differs between two runs.

Only files are read: nothing is measured here, and nothing of this package imports torch.
"""
