"""How fast does the engine train beside others, and in how much memory?"""
