"""Tokenizer and chat template against transformers, on the pair and on tokenizers made here."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers
from tokenizers import (
    AddedToken,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from benchmarks.prompts import OUTSIDE, load_conversations, load_outside
from specinfer.errors import CheckpointError, RequestError
from specinfer.text import Tokenizer

ZOO = Path(__file__).parent.parent / "specinfer" / "zoo"
TEXTS = [
    "",
    " ",
    "Hello, world!",
    "  two  spaces , and a dot .",
    "naïve café — ☃ 🎉👩‍👩‍👧 日本語",
    "tabs\tand\nlines\n\n",
    "<s>quoted</s> <|user|> text",
    "12 345.6",
]
CORPUS = [chat.messages[0]["content"] for chat in load_conversations()[:60]]

CHATML = (
    "{%- for message in messages %}\n"
    "    {%- if message.role not in ['system', 'user', 'assistant'] %}\n"
    "        {{- raise_exception('unknown role ' + message.role) }}\n"
    "    {%- endif %}\n"
    "    {{- '<|im_start|>' + message['role'] + '\\n' }}\n"
    "    {%- if message.role == 'assistant' %}\n"
    "        {%- generation %}{{ message['content'] | trim }}{% endgeneration %}\n"
    "    {%- else %}{{ message['content'] }}{% endif %}\n"
    "    {{- '<|im_end|>\\n' }}\n"
    "{%- endfor %}\n"
    "{%- set ns = namespace(tool=false) %}{% for t in tools or [] %}\n"
    "    {%- set ns.tool = true %}{{ t | tojson }}{% if loop.index > 1 %}{% break %}{% endif %}\n"
    "{%- endfor %}\n"
    "{% if add_generation_prompt %}{{ bos_token or '' }}<|im_start|>assistant\n{% endif %}\n"
)


def byte_level() -> tokenizers.Tokenizer:
    """GPT-2's kind: byte-level BPE, nothing added around a text."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def sentencepiece(*, strip: bool = True) -> tokenizers.Tokenizer:
    """LLaMA's kind: "▁" for spaces, <0xNN> for what the vocabulary lacks."""
    trained = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace(split=True)
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, show_progress=False)
    trained.train_from_iterator(CORPUS, trainer)
    model = json.loads(trained.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    backend = tokenizers.Tokenizer(
        models.BPE(model["vocab"], merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if strip else steps)
    backend.add_special_tokens([AddedToken(text, special=True) for text in special[:3]])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    return backend


def word_piece() -> tokenizers.Tokenizer:
    """BERT's kind: a decoder that is no sum of bytes."""
    backend = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(cleanup=False)
    trainer = trainers.WordPieceTrainer(
        vocab_size=400, special_tokens=["[UNK]", "[PAD]"], show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "byte-level": (byte_level, {"eos_token": "<|im_end|>", "chat_template": CHATML}),
    "sentencepiece": (
        sentencepiece,
        {
            "bos_token": {"content": "<s>", "__type": "AddedToken"},
            "eos_token": "</s>",
            "chat_template": [
                {"name": "default", "template": CHATML},
                {"name": "tool_use", "template": "{{ tools | tojson(indent=1) }}"},
            ],
        },
    ),
    "gemma": (
        lambda: sentencepiece(strip=False),
        {"bos_token": "<s>", "extra_special_tokens": ["<turn>"]},
    ),
    "word-piece": (word_piece, {"unk_token": "[UNK]", "pad_token": "[PAD]"}),
}


def write_folder(folder: Path, kind: str, **files: Any) -> Path:
    make, config = KINDS[kind]
    folder.mkdir(exist_ok=True)
    make().save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **config}
    for name, value in {"tokenizer_config": config, **files}.items():
        (folder / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")
    return folder


@pytest.fixture(scope="module", params=["parley", "parley-draft", *KINDS])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(ours, transformers')"""
    if request.param in KINDS:
        folder = write_folder(tmp_path_factory.mktemp("tokenizer"), request.param)
    else:
        folder = ZOO / request.param
    return Tokenizer.from_folder(folder), transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("add_special_tokens", [True, False])
def test_encodes_as_transformers(pair: Any, add_special_tokens: bool) -> None:
    ours, theirs = pair
    for text in [*TEXTS, *CORPUS, *load_outside(OUTSIDE[0], 10)]:
        expected = theirs.encode(text, add_special_tokens=add_special_tokens)
        assert ours.encode(text, add_special_tokens=add_special_tokens) == expected


@pytest.mark.parametrize("skip_special_tokens", [True, False])
def test_decodes_as_transformers(pair: Any, skip_special_tokens: bool) -> None:
    ours, theirs = pair
    for text in [*TEXTS, *CORPUS]:
        ids = ours.encode(text) + sorted(ours.special_token_ids)
        expected = theirs.decode(
            ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )
        assert ours.decode(ids, skip_special_tokens=skip_special_tokens) == expected


@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_renders_chats_as_transformers(pair: Any, add_generation_prompt: bool) -> None:
    ours, theirs = pair
    if not ours.chat_templates:
        with pytest.raises(RequestError, match="no chat template"):
            ours.render_chat([{"role": "user", "content": "Hi"}])
        return
    for conversation in load_conversations()[:30]:
        messages = [{**message, "name": None} for message in conversation.messages]
        options = {"add_generation_prompt": add_generation_prompt}
        expected = theirs.apply_chat_template(messages, tokenize=False, **options)
        assert ours.render_chat(messages, **options) == expected
        ids = theirs.apply_chat_template(messages, return_dict=False, **options)
        assert ours.apply_chat_template(messages, **options) == ids


def test_renders_tools_as_transformers(tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "f<&>é", "parameters": {}}}] * 3
    messages = [{"role": "user", "content": "Hi"}]
    for kind in ("byte-level", "sentencepiece"):  # the second has a template of its own for tools
        folder = write_folder(tmp_path / kind, kind)
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        expected = theirs.apply_chat_template(messages, tools=tools, tokenize=False)
        ours = Tokenizer.from_folder(folder)
        assert ours.render_chat(messages, tools=tools, add_generation_prompt=False) == expected


def test_template_files_win_over_the_config(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, "byte-level")
    (folder / "chat_template.jinja").write_text("file: {{ messages[0].content }}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "short.jinja").write_text("short")
    ours = Tokenizer.from_folder(folder)
    messages = [{"role": "user", "content": "Hi"}]
    assert ours.render_chat(messages) == "file: Hi"
    assert ours.render_chat(messages, template="short") == "short"
    with pytest.raises(RequestError, match=r"default.*short"):
        ours.render_chat(messages, template="long")


def test_chat_errors_are_one_clear_sentence(tmp_path: Path) -> None:
    bare = Tokenizer.from_folder(write_folder(tmp_path / "bare", "gemma"))
    with pytest.raises(RequestError, match="no chat template"):
        bare.apply_chat_template([{"role": "user", "content": "Hi"}])
    ours = Tokenizer.from_folder(write_folder(tmp_path / "chat", "byte-level"))
    with pytest.raises(RequestError, match="unknown role wizard"):
        ours.apply_chat_template([{"role": "wizard", "content": "Hi"}])
    with pytest.raises(RequestError, match="empty"):
        ours.apply_chat_template([])
    with pytest.raises(RequestError, match="objects"):
        ours.apply_chat_template(["Hi"])  # type: ignore[list-item]
    with pytest.raises(RequestError, match="refuses"):
        ours.apply_chat_template([{"role": "user", "content": object()}])


def test_templates_stay_in_the_sandbox(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, "byte-level")
    for source in (
        "{{ messages.__class__.__mro__ }}",
        "{% set ns = namespace() %}{% set ns.__init__ = 1 %}",
        "{{ messages.append(1) }}",
    ):
        (folder / "chat_template.jinja").write_text(source)
        with pytest.raises(RequestError, match="refuses"):
            Tokenizer.from_folder(folder).render_chat([{"role": "user", "content": "Hi"}])
    (folder / "chat_template.jinja").write_text("{% if %}")
    with pytest.raises(CheckpointError, match="chat template"):
        Tokenizer.from_folder(folder).render_chat([{"role": "user", "content": "Hi"}])


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"generation_config": {"eos_token_id": [5, 6]}, "config": {"eos_token_id": 7}}, {5, 6}),
        ({"generation_config": {"eos_token_id": 5}}, {5}),
        ({"generation_config": {}, "config": {"eos_token_id": 7}}, {7}),
        ({"config": {"text_config": {"eos_token_id": [8]}}}, {8}),
        ({}, {1}),  # <|im_end|>, the tokenizer's own
    ],
)
def test_end_tokens(tmp_path: Path, files: dict[str, Any], expected: set[int]) -> None:
    assert Tokenizer.from_folder(write_folder(tmp_path, "byte-level", **files)).eos_token_ids == (
        expected
    )


def test_generation_defaults_carry_our_names(tmp_path: Path) -> None:
    generation = {"temperature": 0.6, "top_k": 20, "max_new_tokens": 7, "top_p": None, "bos": 1}
    folder = write_folder(tmp_path, "byte-level", generation_config=generation)
    defaults = Tokenizer.from_folder(folder).generation_defaults
    assert defaults == {"temperature": 0.6, "top_k": 20, "max_tokens": 7}


def test_special_tokens_map_fills_what_the_config_lacks(tmp_path: Path) -> None:
    folder = write_folder(
        tmp_path,
        "byte-level",
        tokenizer_config={"eos_token": "<|im_end|>"},
        special_tokens_map={"eos_token": "other", "bos_token": {"content": "<|im_start|>"}},
    )
    assert Tokenizer.from_folder(folder).special_tokens == {
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
    }


def test_baked_in_truncation_and_padding_are_ignored(tmp_path: Path) -> None:
    backend = byte_level()
    backend.enable_truncation(2)
    backend.enable_padding(length=64)
    backend.save(str(tmp_path / "tokenizer.json"))
    text = "How do you do, all of you?"
    assert Tokenizer.from_folder(tmp_path).encode(text) == byte_level().encode(text).ids


def test_a_folder_without_tokenizer_json_is_converted(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, "byte-level")
    expected = Tokenizer.from_folder(folder).encode("Hello, world!")
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = "\n".join(" ".join(merge) for merge in model["merges"])
    (folder / "merges.txt").write_text("#version: 0.2\n" + merges)
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    (folder / "tokenizer.json").unlink()
    assert Tokenizer.from_folder(folder).encode("Hello, world!") == expected


def test_broken_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        Tokenizer.from_folder(tmp_path)
    shutil.copy(ZOO / "parley" / "tokenizer.json", tmp_path)
    for text in ("{", "[]"):
        (tmp_path / "generation_config.json").write_text(text)
        with pytest.raises(CheckpointError, match="generation_config"):
            Tokenizer.from_folder(tmp_path)


def test_vocabularies_can_be_compared(tmp_path: Path) -> None:
    target, drafter = (Tokenizer.from_folder(ZOO / name) for name in ("parley", "parley-draft"))
    assert target.vocab_size == 4096
    assert target.has_same_vocabulary(drafter)
    other = Tokenizer.from_folder(write_folder(tmp_path, "byte-level"))
    assert not target.has_same_vocabulary(other)


def test_importing_it_does_not_import_transformers() -> None:
    code = (
        "import sys, specinfer.text; print('transformers' in sys.modules, 'torch' in sys.modules)"
    )
    root = Path(__file__).parent.parent
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root
    )
    assert out.stdout.split() == ["False", "False"]
