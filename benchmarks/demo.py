"""What `make demo` shows: text from a token tree, then plain against tree decoding, in one minute.

The bundled pair is small: there a step costs little more than the calls that make it up. So the
same comparison is run on a twin of the pair that computes the same function at the cost of a 0.3B
model.
"""

import sys

from rich.console import Console

from benchmarks.inflate import twin
from benchmarks.latency import Ours
from benchmarks.prompts import load_chats
from specinfer.bench import measure, ratio
from specinfer.engine.stats import PARTS
from specinfer.llm import LLM
from specinfer.request import SamplingParams

PROMPT = "Please tell me a story about a little dog who finds a ball."
NUM_PROMPTS = 6
NUM_TOKENS = 64


def write_a_story(console: Console) -> None:
    """Stream an answer and say how it came about."""
    llm = LLM("zoo:parley", drafters=["zoo:parley-draft"])
    console.print(f"[bold]{PROMPT}[/]\n")
    shown = ""
    params = SamplingParams(temperature=0.5, seed=2, max_tokens=150)
    for output in llm.stream([{"role": "user", "content": PROMPT}], params):
        text = output.outputs[0].text
        console.print(text[len(shown) :], end="", highlight=False, markup=False, soft_wrap=True)
        shown = text
        sys.stdout.flush()
    stats, engine = output.stats, llm.engine.stats
    console.print(
        f"\n\n[dim]{stats.num_output_tokens} tokens in {stats.num_target_steps} target steps: "
        f"{stats.tokens_per_step:.2f} tokens a step (plain decoding: 1), "
        f"{stats.num_accepted} of {stats.num_drafted} drafted tokens accepted.\n"
        f"accepted at depth 1, 2, ...: {' '.join(map(str, stats.accepted_by_depth))}\n"
        "ms a step: "
        + ", ".join(f"{part} {engine.seconds[part] * 1e3 / engine.num_steps:.2f}" for part in PARTS)
        + "[/]"
    )


def compare(console: Console, label: str, target: str, tree: str) -> None:
    """Plain against tree decoding on the same prompts, alternating."""
    ours = Ours(target, "zoo:parley-draft", "float32")
    encode = ours.llm.tokenizer.apply_chat_template
    prompts = [encode(chat) for chat in load_chats(NUM_PROMPTS, encode=encode)]
    texts: dict[str, list[list[int]]] = {"off": [], tree: []}
    systems = {each: ours.system(each, NUM_TOKENS, 0.0, keep=texts[each]) for each in texts}
    rates = measure(systems, prompts)
    speedup = ratio(rates, tree, "off")
    pairs = list(zip(*texts.values(), strict=True))[1:]  # the first was the warm-up
    same = sum(a == b for a, b in pairs)
    console.print(
        f"{label}, tree {tree}: plain {sum(rates['off']) / NUM_PROMPTS:.0f} tok/s, "
        f"tree {sum(rates[tree]) / NUM_PROMPTS:.0f} tok/s: [bold]{speedup}x[/]; "
        f"same text for {same} of {len(pairs)} prompts"
    )


def main() -> None:
    """Run the demo."""
    console = Console(highlight=False)
    write_a_story(console)
    console.print(
        f"\nPlain against tree decoding, greedy, float32, {NUM_PROMPTS} prompts x {NUM_TOKENS} "
        "tokens, alternating;\nmedian speed-up and quartiles:"
    )
    compare(console, "the pair (11M)", "zoo:parley", "1,1,1")
    target = str(twin("0.3b"))
    compare(console, "target inflated to 0.3B cost (drafter as it is)", target, "1,1,1,1,1")
    console.print("\n[dim]More: .venv/bin/specinfer --help, docs/performance.md[/]")


if __name__ == "__main__":
    main()
