"""What the tests above the models share: toy decoders, an engine around them, scripted drafters."""

import string
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from torch import Tensor

from specinfer.cache.blocks import BlockAllocator, Pages
from specinfer.config import EngineConfig, Speculation
from specinfer.draft import growth
from specinfer.draft.base import Draft, Drafter
from specinfer.draft.model import ModelDrafter
from specinfer.engine import verification
from specinfer.engine.controller import Controller
from specinfer.engine.engine import Engine
from specinfer.engine.sequence import Sequence as EngineSequence
from specinfer.engine.stats import StepLoad
from specinfer.models.architecture import read_architecture
from specinfer.models.decoder import Decoder
from specinfer.run.batch import Span
from specinfer.run.runner import Runner
from specinfer.text.tokenizer import Tokenizer
from tests.helpers import toy_config

LETTERS = string.ascii_letters + string.digits


@torch.no_grad()
def toy_decoder(seed: int = 0, *, head: float = 0.2, **changes: Any) -> Decoder:
    """A float32 decoder whose context matters and whose laws are far from uniform.

    head  standard deviation of the output weights: more is a sharper law
    """
    decoder = Decoder(read_architecture(toy_config(**changes)), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in decoder.named_parameters():
        scale = {"lm_head": head, "embeddi": 0.5}.get(name[:7], 0.15)
        parameter.normal_(0.0, scale, generator=generator)
        if name.endswith("norm.weight"):
            parameter.add_(1.0)
    return decoder.eval()


def toy_tokenizer(vocab_size: int, eos_token_ids: Sequence[int] = ()) -> Tokenizer:
    """One letter per token."""
    vocab = {LETTERS[token]: token for token in range(vocab_size)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token=LETTERS[0]))
    backend.decoder = tokenizers.decoders.ByteLevel()
    return Tokenizer(backend, eos_token_ids=eos_token_ids)


def toy_engine(
    target: Decoder,
    drafters: Sequence[Drafter] = (),
    *,
    speculation: Speculation | None = None,
    num_blocks: int = 64,
    config: EngineConfig | None = None,
    max_model_len: int = 48,
    eos_token_ids: Sequence[int] = (),
    **options: Any,
) -> Engine:
    """An engine over a toy target."""
    config = config or EngineConfig(block_size=4)
    return Engine(
        Runner(target, num_blocks * config.block_size),
        drafters,
        toy_tokenizer(target.architecture.vocab_size, eos_token_ids),
        allocator=BlockAllocator(num_blocks, config.block_size),
        config=config,
        speculation=speculation or Speculation(),
        max_model_len=max_model_len,
        **options,
    )


def finish(engine: Engine) -> None:
    """Step until nothing is left to do."""
    while engine.has_work:
        engine.step()


def model_drafter(decoder: Decoder, engine_slots: int, **changes: Any) -> ModelDrafter:
    """A toy drafter with as many slots as the target has."""
    options = {"vocab_size": decoder.architecture.vocab_size, "max_tokens": 2048} | changes
    return ModelDrafter("toy", Runner(decoder, engine_slots), **options)


def run_pages(num_tokens: int) -> Pages:
    """Pages that are one run from slot 0."""
    return Pages(range(num_tokens), 1)


def scattered_pages(num_tokens: int, block_size: int, num_slots: int, seed: int = 0) -> Pages:
    """Pages whose blocks lie anywhere."""
    blocks = np.random.default_rng(seed).permutation(num_slots // block_size)
    return Pages(blocks[: -(-num_tokens // block_size)].tolist(), block_size)


def chain(tokens: Sequence[int], pages: Pages, start: int = 0, num_logits: int = 1) -> Span:
    """Known tokens behind `start` known ones."""
    return Span(
        tokens=tokens,
        positions=range(start, start + len(tokens)),
        pages=pages,
        prefix=start,
        start=start,
        mask=None,
        num_logits=num_logits,
    )


def fresh_logits(decoder: Decoder, tokens: Sequence[int]) -> Tensor:
    """[tokens, vocab]: the logits of a whole sequence in one pass over new pages."""
    runner = Runner(decoder, len(tokens))
    return runner.run([chain(tokens, run_pages(len(tokens)), num_logits=len(tokens))])


def keys_and_values(runner: Runner, pages: Pages, stop: int) -> Tensor:
    """[layers, 2, kv_heads, stop, head_dim]: what stands at keys 0 … stop - 1."""
    layers = range(runner.decoder.architecture.num_layers)
    slots = pages.slots(0, stop)
    return torch.stack([torch.stack([p[:, slots] for p in runner.pool.layer(n)]) for n in layers])


def fresh_keys_and_values(decoder: Decoder, tokens: Sequence[int]) -> Tensor:
    """The same after one pass over new pages."""
    runner, pages = Runner(decoder, len(tokens)), run_pages(len(tokens))
    runner.run([chain(tokens, pages)])
    return keys_and_values(runner, pages, len(tokens))


def far_away(monkeypatch: pytest.MonkeyPatch, support: int) -> None:
    """Let growth and verification treat laws at hand as if they were on a GPU.

    support  tokens that a law is cut to where it is drawn from
    """
    for module in (growth, verification):
        monkeypatch.setattr(module, "is_far", lambda tensor: True)
    monkeypatch.setattr(growth, "SUPPORT", support)


class ScriptedDrafter:
    """Proposes what a function of what is known and the path to a node says, best first.

    admitted  per admit and draft: the tokens it was told of
    dropped   the keys it was told to forget
    """

    def __init__(
        self,
        script: Callable[[list[int], list[int]], Sequence[int]],
        vocab_size: int,
        name: str = "scripted",
    ) -> None:
        self.name = name
        self.max_positions = 1 << 30
        self.admitted: list[list[int]] = []
        self.dropped: list[int] = []
        self._script = script
        self._vocab_size = vocab_size

    def expand(self, frontier: list[tuple[Draft, list[int]]]) -> Tensor:
        rows = []
        for draft, nodes in frontier:
            for node in nodes:
                path = [draft.tree.tokens[each] for each in draft.tree.path(node)]
                row = torch.full((self._vocab_size,), -torch.inf)
                for rank, token in enumerate(self._script(draft.tokens, path)):
                    row[token] = -25.0 * rank  # more than any noise, less than float32 forgets
                rows.append(row)
        return torch.stack(rows)

    def admit(self, accepted: list[tuple[Draft, list[int]]]) -> None:
        for draft, path in accepted:
            self.admitted.append([draft.tree.tokens[node] for node in path])

    def drop(self, key: int) -> None:
        self.dropped.append(key)


class Told(Controller):
    """One to whom every step takes exactly what it was expected to take."""

    def observe(self, load: StepLoad, *, decoding_only: bool) -> None:
        load.target_s = self.target.seconds(load.num_tokens, load.num_spans)
        load.passes = [one._replace(seconds=self.pass_s(one)) for one in load.passes]
        load.host_s = 1e-4
        super().observe(load, decoding_only=decoding_only)


def free_blocks(engine: Engine) -> int:
    """Blocks that nobody owns."""
    return engine.scheduler._allocator.num_free


def outputs_of(sequences: Sequence[EngineSequence]) -> list[tuple[Any, ...]]:
    """What callers see of each sequence."""
    return [
        (o.text, tuple(o.token_ids), o.finish_reason, o.stop_reason)
        for o in (sequence.output for sequence in sequences)
    ]
