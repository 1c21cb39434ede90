"""The command line, in this process where possible: one loaded pair serves most tests."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from specinfer.cli.chat import _Chat
from specinfer.cli.options import _GROUPS, _RENAMED, Asked, read_help, shown
from specinfer.errors import ConfigError
from specinfer.llm import LLM
from specinfer.request import SamplingParams
from tests.command_line import STORY, refuses, run

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def pair() -> LLM:
    return LLM("zoo:parley", drafters=["zoo:parley-draft"], dtype="float32")


@pytest.fixture
def loaded(pair: LLM, monkeypatch: pytest.MonkeyPatch) -> Iterator[LLM]:
    """The commands get the loaded pair, with its own context and the trees asked for."""

    def load(asked: Asked) -> LLM:
        pair.engine.set_speculation(asked.speculation)
        return pair

    monkeypatch.setattr(Asked, "load", load)
    yield pair
    assert not pair.engine.has_work, "a request was left behind"


def test_other_commands_refuse_too(loaded: LLM, tmp_path: Path) -> None:
    refuses(run("tree", "Hi", "--n", "2"), ["n=2"])
    refuses(run("tree", "Hi", "--svg", str(tmp_path / "no" / "file.svg")), ["no/file.svg"])
    refuses(run("chat", "--n", "2"), ["n=2"])
    refuses(run("bench", "latency", "--drafter", "none"), ["--drafter"])
    refuses(run("bench", "latency", "--tree", "off"), ["--tree"])
    refuses(run("bench", "latency", ""), ["prompt is empty"])
    refuses(run("generate", "--lines", stdin="\n\n"), ["no prompt"])
    refuses(run("generate", stdin=""), ["prompt is empty"])


@pytest.mark.usefixtures("loaded")
def test_a_full_disk_is_a_sentence() -> None:
    result = run("tree", *STORY, "--steps", "1", "--svg", "/dev/full")
    assert result.exit_code == 1
    assert result.stderr == "error: [Errno 28] No space left on device\n"


def test_what_a_model_asks_for_is_done(loaded: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    defaults = {"repetition_penalty": 1.1, "top_p": 0.8}
    monkeypatch.setattr(loaded.tokenizer, "generation_defaults", defaults)
    params = loaded.default_sampling_params(top_k=3)
    assert (params.repetition_penalty, params.top_p, params.top_k) == (1.1, 0.8, 3)


# --- flags ----------------------------------------------------------------------------------------


def test_every_built_field_is_a_flag_with_help(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    text = run("generate", "--help").stdout
    for _, group in _GROUPS:
        for field in shown(group):
            name = _RENAMED.get((group, field.name), field.name)
            assert f"--{name.replace('_', '-')}" in text
            assert read_help(group).get(field.name), f"{group.__name__}.{field.name} has no help"
    for name in ("logprobs", "prompt-logprobs", "cache-salt", "include-tree"):
        assert f"--{name}" not in text
    assert "--speculation " not in text, "a command line has one request: its parts are flags"


@pytest.mark.parametrize("command", ["generate", "chat", "serve"])
def test_help_cuts_no_name_off_in_a_narrow_terminal(
    command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    cut = [line for line in run(command, "--help").stdout.splitlines() if "…" in line]
    assert cut == []


def test_help_speaks_of_flags_and_asks_switches_for_no_value(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    for command in ([], ["generate"], ["serve"], ["bench"], ["bench", "serve"]):
        assert "<bool>" not in run(*command, "--help").stdout
    text = run("generate", "--help").stdout
    assert "unless --include-stop-str-in-output" in text
    assert "requests of --max-model-len" in text
    assert "generation_config.json" in text


def test_flags_become_the_dataclasses() -> None:
    given = {"temperature": 0.5, "stop": ["a", "b"], "tree": "2,1", "engine_seed": 7, "seed": 3}
    asked = Asked.read(given)
    assert asked.sampling == {"temperature": 0.5, "stop": ["a", "b"], "seed": 3}
    assert (asked.speculation.tree, asked.engine.seed) == ("2,1", 7)
    assert asked.drafters == ("zoo:parley-draft",)
    assert Asked.read({"model": "zoo:parley-draft"}).drafters == ()
    assert Asked.read({"drafter": ["none"]}).drafters == ()


def test_flags_in_json_become_values() -> None:
    given = {
        "logit_bias": '{"17": -2.5}',
        "structured_outputs": '{"choice": ["yes", "no"]}',
        "bad_words": ["um"],
        "allowed_token_ids": [3, 4],
        "repetition_penalty": 1.2,
    }
    assert Asked.read(given).sampling == {
        **given,
        "logit_bias": {17: -2.5},
        "structured_outputs": {"choice": ["yes", "no"]},
    }
    with pytest.raises(ConfigError, match="is no JSON: give such as"):
        Asked.read({"logit_bias": "{17: 1}"})
    for text in ("[1]", '{"a": 1}'):
        with pytest.raises(ConfigError, match="is no biases by token id: give such as"):
            Asked.read({"logit_bias": text})


def test_speculative_config_names_drafter_and_tree() -> None:
    config = {"model": "zoo:parley-draft", "num_speculative_tokens": 3, "method": "draft_model"}
    asked = Asked.read({"speculative_config": json.dumps(config), "verifier": "topdown"})
    assert asked.drafters == ("zoo:parley-draft",)
    assert (asked.speculation.tree, asked.speculation.verifier) == ("1,1,1", "topdown")


def test_help_imports_nothing_slow() -> None:
    code = (
        "import sys, specinfer.cli as c\n"
        "try: c.app(['generate', '--help'])\n"
        "except SystemExit: pass\n"
        "print(*{'torch', 'transformers', 'numpy'} & set(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stderr.strip() == ""


# --- generate -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("loaded")
def test_generate_writes_what_python_gives(pair: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=24)
    [output] = pair.chat([{"role": "user", "content": "Tell me a story"}], params)
    result = run("generate", *STORY)
    assert result.exit_code == 0, result.output
    assert result.stdout == output.outputs[0].text + "\n"
    assert result.stderr == ""
    raw = run("generate", "Once upon a", "--temperature", "0", "--max-tokens", "24")
    [output] = pair.generate("Once upon a", params)
    assert raw.stdout == output.outputs[0].text + "\n"


@pytest.mark.usefixtures("loaded")
def test_generate_reads_files_and_pipes(tmp_path: Path) -> None:
    expected = run("generate", *STORY).stdout
    file = tmp_path / "prompt.txt"
    file.write_text(STORY[0] + "\n")
    assert run("generate", "--file", str(file), *STORY[1:]).stdout == expected
    assert run("generate", *STORY[1:], stdin=STORY[0] + "\n").stdout == expected
    assert run("generate", "-", *STORY[1:], stdin=STORY[0]).stdout == expected


@pytest.mark.usefixtures("loaded")
def test_generate_prints_stats() -> None:
    result = run("generate", *STORY, "--stats")
    assert "per step" in result.stderr
    assert "1:" in next(line for line in result.stderr.splitlines() if "by depth" in line)
    for part in ("zoo:parley-draft", "draft", "target", "verify", "commit", "other", "tokens/s"):
        assert part in result.stderr


@pytest.mark.usefixtures("loaded")
def test_generate_prints_the_latency_goal() -> None:
    """Only where there is one; a text of one token has no pace."""

    def goal(*args: str) -> str:
        lines = run("generate", *args, "--stats").stderr.splitlines()
        return next((line.strip() for line in lines if line.lstrip().startswith("goal")), "")

    assert goal(*STORY) == ""
    assert goal("Hi", "--max-tokens", "1", "--target-tpot-s", "1") == ""
    met = goal(*STORY, "--target-tpot-s", "1000")
    assert met.startswith("goal  met: ")
    assert met.endswith(" ms per token (asked for 1000000.0)")
    assert goal(*STORY, "--target-tpot-s", "1e-4").startswith("goal  missed: ")
    several = goal(*STORY, "--n", "2", "--target-tpot-s", "1000")
    assert several.startswith("goal  met by 2 of 2: at most ")


@pytest.mark.usefixtures("loaded")
def test_generate_takes_a_prediction() -> None:
    plain = run("generate", *STORY, "--tree", "off")
    result = run("generate", *STORY, "--json", "--prediction", plain.stdout.strip())
    found = json.loads(result.stdout)
    assert found["outputs"][0]["text"] + "\n" == plain.stdout
    assert found["stats"]["accepted_by_source"]["prediction"] > 8
    assert found["time"]["num_goals"] == 0
    listed = run("generate", *STORY, "--stats", "--prediction", plain.stdout.strip()).stderr
    assert any("by source  prediction" in line for line in listed.splitlines())


@pytest.mark.usefixtures("loaded")
@pytest.mark.parametrize(
    "flags",
    [
        ("--tree", "auto"),
        ("--tree", "sequoia"),
        ("--tree", "4x8"),
        ("--tree", "calibrated", "--max-nodes", "12"),
        ("--tree", "1,1,1,1", "--control", "gammatune"),
        ("--tree", "1,1,1,1", "--control", "smartspec"),
    ],
    ids=" ".join,
)
def test_every_way_of_speculating_writes_the_same(flags: tuple[str, ...]) -> None:
    found = json.loads(run("generate", *STORY, *flags, "--json").stdout)
    assert found["outputs"][0]["text"] + "\n" == run("generate", *STORY, "--tree", "off").stdout
    assert found["stats"]["num_accepted"] > 0


SMALL = ("--model", "zoo:parley-draft", "--dtype", "float32", "--temperature", "0")


def test_calibration_is_read_and_written(tmp_path: Path) -> None:
    file = tmp_path / "learnt.json"
    flags = (*SMALL, "--max-tokens", "16", "--drafter", "ngram", "--tree", "calibrated")
    flags += ("--calibration", str(file))
    first = run("generate", "One day One day One day", *flags)
    assert first.exit_code == 0, first.output
    before = json.loads(file.read_text())
    assert [table["drafter"] for table in before["tables"]] == ["ngram"]
    second = run("generate", "One day One day One day", *flags)
    assert second.stdout == first.stdout

    def num_trials(content: dict[str, Any]) -> float:
        return sum(map(sum, content["tables"][0]["after"]["trials"]))

    after = json.loads(file.read_text())
    assert num_trials(after) > num_trials(before)
    assert [each.name for each in tmp_path.iterdir()] == ["learnt.json"]
    run("tree", "One day One day One day", "--steps", "16", *flags)
    assert num_trials(json.loads(file.read_text())) > num_trials(after)
    file.write_text("{")
    refuses(run("generate", "Hi", *flags), [str(file), "cannot be read"])
    refuses(run("generate", "Hi", *flags[:-1], str(tmp_path / "no" / "file")), ["no/file"])


def test_vllms_ngrams_from_end_to_end() -> None:
    config = json.dumps({"method": "ngram", "num_speculative_tokens": 4})
    prompt = "One day One day One day One"
    flags = (*SMALL, "--max-tokens", "16", "--json")
    found = json.loads(run("generate", prompt, *flags, "--speculative-config", config).stdout)
    plain = json.loads(run("generate", prompt, *flags).stdout)
    assert found["outputs"] == plain["outputs"]
    assert found["stats"]["num_drafted"] > 0
    assert len(found["stats"]["accepted_by_depth"]) <= 4
    assert set(found["stats"]["accepted_by_source"]) <= {"ngram"}


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (
            ["Hi", "--max-tokens", "500"],
            "(the text ends where the context is full: max_model_len=40)\n",
        ),
        (["Hi"], "(the text ends where the context is full: max_model_len=40)\n"),
        (["Hi", "--n", "3"], "(3 of 3 texts end where the context is full: max_model_len=40)\n"),
        (["Hi", "--max-tokens", "8"], ""),
        (["Hi", "--min-tokens", "4", "--stop", " ", "--max-tokens", "500"], ""),
    ],
)
def test_generate_says_where_the_context_is_full(args: list[str], said: str) -> None:
    result = run("generate", *args, "--max-model-len", "40", "--ignore-eos", "--seed", "1")
    assert result.exit_code == 0
    assert result.stderr == said


@pytest.mark.usefixtures("loaded")
def test_generate_prints_json() -> None:
    result = run("generate", *STORY, "--json")
    found = json.loads(result.stdout)
    assert found["prompt"] == STORY[0]
    assert found["outputs"][0]["text"] + "\n" == run("generate", *STORY).stdout
    assert found["outputs"][0]["finish_reason"] == "length"
    stats = found["stats"]
    assert stats["tokens_per_step"] == 24 / stats["num_target_steps"] > 1
    assert found["time"]["seconds"].keys() >= {"draft", "target", "verify"}


@pytest.mark.usefixtures("loaded")
def test_generate_serves_lines_together() -> None:
    flags = ("--temperature", "0", "--max-tokens", "12", "--lines")
    result = run("generate", *flags, "--json", stdin="Once upon a\n\nThe fox\n")
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [row["prompt"] for row in rows] == ["Once upon a", "The fox"]
    text = run("generate", *flags, stdin="Once upon a\n\nThe fox\n").stdout
    assert text == "".join(
        f"==> {row['prompt']} <==\n{row['outputs'][0]['text']}\n\n" for row in rows
    )
    assert run("generate", "Hi", "--n", "2", "--max-tokens", "4").stdout.count("<==") == 2


# --- chat -----------------------------------------------------------------------------------------

CHAT = ("chat", "--temperature", "0", "--max-tokens", "12")


def test_chat_remembers_and_forgets(pair: LLM, loaded: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=12)

    def answer(*messages: str) -> str:
        roles = ("user", "assistant") * len(messages)
        chat = [{"role": r, "content": m} for r, m in zip(roles, messages, strict=False)]
        return pair.chat(chat, params)[0].outputs[0].text

    first = answer("Hello")
    second = answer("Hello", first, "And then?")
    result = run(*CHAT, stdin="Hello\n\nAnd then?\n/reset\nHello\n/exit\nnever\n")
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{first}\n{second}\n{first}\n"
    assert "starts anew" in result.stderr


@pytest.mark.usefixtures("loaded")
def test_chat_knows_its_commands() -> None:
    result = run("chat", "--max-tokens", "3", "--stats", stdin="/nonsense\n/help\nHello")
    assert result.exit_code == 0
    assert "/nonsense is no command" in result.stderr
    assert "cut at max_tokens=3" in result.stderr
    assert re.search(r"\(3 tokens, \d\.\d\d per step, \d+ per second\)", result.stderr)


def test_chat_is_told_what_it_is_and_remembers(pair: LLM, loaded: LLM) -> None:
    system = {"role": "system", "content": "You write fables."}
    chat = [system, {"role": "user", "content": "Hello"}]
    told = pair.chat(chat, SamplingParams(temperature=0, max_tokens=12))[0].outputs[0].text
    stdin = "Hello\n/reset\nHello\n"
    result = run(*CHAT, "--system", system["content"], stdin=stdin)
    assert result.stdout == f"{told}\n{told}\n"
    assert run(*CHAT, stdin="Hello\n").stdout != f"{told}\n"


def test_chat_says_when_the_context_is_full(loaded: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loaded.engine, "max_model_len", 24)
    stdin = f"Hello\n{'word ' * 30}\n/reset\nHello\n"
    result = run("chat", "--temperature", "0", "--ignore-eos", stdin=stdin)
    assert result.exit_code == 0, result.output
    assert "the context is full: say /reset" in result.stderr
    assert "the context holds 24: say /reset" in result.stderr
    first, second = result.stdout.splitlines()
    assert first == second


def interactive(llm: LLM, monkeypatch: pytest.MonkeyPatch, *lines: Any) -> _Chat:
    """A chat at a terminal where these lines are typed; an exception class is raised instead."""
    typed = iter(lines)

    def read(prompt: str) -> str:
        line = next(typed)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", read)
    params = SamplingParams(temperature=0, max_tokens=12)
    return _Chat(llm, params, is_terminal=True, has_stats=False)


def test_two_ctrl_c_at_the_prompt_end_a_chat(pair: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    stop = KeyboardInterrupt
    chat = interactive(pair, monkeypatch, stop, "Hello", stop, stop, "never")
    chat.run()
    assert len(chat.messages) == 2
    interactive(pair, monkeypatch, EOFError).run()


def test_ctrl_c_stops_the_answer_and_keeps_the_chat(
    loaded: LLM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    written = []

    def write(text: str) -> None:
        if not written:
            os.kill(os.getpid(), signal.SIGINT)
        written.append(text)

    monkeypatch.setattr("specinfer.cli.chat.write_now", write)
    chat = interactive(loaded, monkeypatch, "Tell me a story", KeyboardInterrupt)
    chat.params = SamplingParams(temperature=0, max_tokens=200)
    chat.run()
    assert "(stopped)" in capsys.readouterr().err
    assert [message["role"] for message in chat.messages] == ["user", "assistant"]
    assert 0 < len(chat.messages[1]["content"]) < 100
    [output] = loaded.generate("Once upon a", SamplingParams(temperature=0, max_tokens=8))
    assert output.finished


# --- tree, bench, models --------------------------------------------------------------------------


@pytest.mark.usefixtures("loaded")
def test_tree_draws_in_the_terminal_and_as_svg(tmp_path: Path) -> None:
    file = tmp_path / "tree.svg"
    result = run("tree", *STORY, "--steps", "3", "--svg", str(file))
    assert result.exit_code == 0, result.output
    assert "step 3:" in result.stdout
    assert "step 4:" not in result.stdout
    assert "━" in result.stdout
    root = ElementTree.parse(file).getroot()
    words = [text.text for text in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "Tell me a story" in words
    assert sum(word is not None and word.startswith("step ") for word in words) == 3


@pytest.mark.usefixtures("loaded")
def test_tree_is_whole_in_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    result = run("tree", *STORY, "--steps", "3", "--tree", "1,1,1,1,1,1,1,1")
    assert "…" not in result.stdout
    assert "·upon━━━·a━━━·time━━━,━━━" in result.stdout


@pytest.mark.usefixtures("loaded")
def test_tree_json_spells_the_text() -> None:
    found = json.loads(run("tree", *STORY, "--steps", "99", "--json").stdout)
    text = "".join(step["text"] for step in found["steps"])
    assert text + "\n" == run("generate", *STORY).stdout
    for step in found["steps"]:
        states = [node["state"] for node in step["nodes"]]
        assert states.count("accepted") == step["num_accepted"]
        assert states[0] == "root"
        assert all(node["parent"] < index for index, node in enumerate(step["nodes"]))


@pytest.mark.usefixtures("loaded")
def test_bench_latency_compares(tmp_path: Path) -> None:
    flags = ("--pairs", "2", "--max-tokens", "8", "--tree", "1,1")
    result = run("bench", "latency", "Hi", "Hello", *flags, "--json", str(tmp_path / "b.json"))
    assert result.exit_code == 0, result.output
    assert "4 of 4" in result.stdout
    found = json.loads((tmp_path / "b.json").read_text())
    assert found["systems"]["plain"]["tokens_per_step"] == 1.0
    assert found["systems"]["tree"]["tokens_per_step"] > 1.0
    assert len(found["systems"]["tree"]["runs"]) == 4
    assert "tree 1,1" in result.stdout
    printed = run("bench", "latency", "Hi", *flags, "--json", "-")
    assert json.loads(printed.stdout)["prompts"] == ["Hi"]
    default = run("bench", "latency", "Hi", *flags[:4])
    assert "tree auto" in default.stdout


def test_models_lists_the_zoo() -> None:
    rows = json.loads(run("models", "--json").stdout)
    assert [row["name"] for row in rows] == ["zoo:parley", "zoo:parley-draft"]
    assert [round(row["num_parameters"] / 1e6, 1) for row in rows] == [11.0, 1.6]
    assert "zoo:parley-draft" in run("models").stdout


# --- as a process ---------------------------------------------------------------------------------


def start(*args: str, **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-u", "-m", "specinfer", *args],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def test_ctrl_c_ends_cleanly() -> None:
    process = start("generate", "Once", "--ignore-eos", "--tree", "off")
    assert process.stdout
    assert process.stdout.read(5)
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert rest.endswith("\n")
    assert errors == ""


def test_a_reader_that_goes_away_is_no_error() -> None:
    process = start("generate", "Once", "--ignore-eos", "--tree", "off", "--stats")
    assert process.stdout
    assert process.stdout.read(5)
    process.stdout.close()
    with process:
        assert process.stderr
        assert process.stderr.read() == ""


@pytest.mark.parametrize("command", [[], ["generate"], ["serve"]])
def test_help_imports_nothing_heavy(command: list[str]) -> None:
    told = [sys.executable, "-X", "importtime", "-m", "specinfer", *command, "--help"]
    result = subprocess.run(told, cwd=ROOT, capture_output=True, text=True, check=True)
    imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert "specinfer.cli.main" in imported
    assert imported.isdisjoint({"torch", "transformers", "tokenizers", "fastapi", "xgrammar"})


def test_the_version_needs_no_command() -> None:
    result = run("--version")
    assert result.exit_code == 0
    assert result.stdout.startswith("specinfer ")
