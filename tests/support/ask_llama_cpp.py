"""Run by the Python of an environment with llama-cpp-python: prints its greedy answers.

    python ask_llama_cpp.py MODEL.gguf NUM_NEW < PROMPTS.json

Prints a JSON list, for each prompt of the list its tokens and NUM_NEW more.
"""

import json
import sys


def main(model: str, num_new: str) -> None:
    import llama_cpp

    llama = llama_cpp.Llama(model, n_ctx=1024, n_threads=1, verbose=False, logits_all=True)
    found = []
    for prompt in json.load(sys.stdin):
        asked = llama.tokenize(prompt.encode(), add_bos=False, special=True)
        tokens = list(asked)
        llama.reset()
        llama.eval(tokens)
        for _ in range(int(num_new)):
            tokens.append(int(llama.scores[len(tokens) - 1].argmax()))
            llama.eval(tokens[-1:])
        found.append([asked, tokens[len(asked) :]])
    print(json.dumps({"version": llama_cpp.__version__, "found": found}))


if __name__ == "__main__":
    main(*sys.argv[1:])
