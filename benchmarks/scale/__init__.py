"""How does the cost of the engine grow with the size of what it is given?"""
