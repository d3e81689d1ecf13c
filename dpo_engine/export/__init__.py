"""After training: adapters become plain models, GGUF files and commands that serve them, each checked before it is called done.

adapter   what an adapter folder holds, and whether it fits a base
merge     base and adapter become one set of weights
check     what the merged model says, against the adapter on its base
folder    a folder that appears whole or not at all, and whether there is room for it
serving   the commands that serve a result
gguf      llama.cpp's own converter, run on a merged folder
run       what `dpo-engine export` does
opening   a model or an adapter, ready to answer
"""
