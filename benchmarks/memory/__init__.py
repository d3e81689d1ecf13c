"""How much memory does a call take as the vocabulary grows, and where does that of a whole optimiser step go?"""
