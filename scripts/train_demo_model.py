"""Makes the demo model that `supervisor up` serves when there is no GPU: a tiny Llama, trained on one page of text.

supervisor/demo/training.yaml and this script are all that goes in: no other model, no download. The same machine and
library versions give the same bytes. It takes minutes on one CPU core, and model.safetensors stays below 4 MB.

Needs torch, transformers, tokenizers, safetensors and PyYAML; vLLM's environment has them all. With --check nothing is
trained: it says whether the shipped model fits the text, loads and answers, with exit code 1 and the reasons if not.
"""

import argparse
import json
import math
import random
import re
import shutil
import time
from collections.abc import Callable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import yaml
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils.chat_template_utils import render_jinja_template

DEMO = Path(__file__).resolve().parent.parent / "supervisor" / "demo"
TEXT, MODEL = DEMO / "training.yaml", DEMO / "model"
WRITTEN_BY_HAND = ("README.md", "chat_template.jinja", "config.json", "generation_config.json", "tokenizer_config.json")
CONFIG: dict[str, Any] = json.loads((MODEL / "config.json").read_text(encoding="utf-8"))
MAX_WEIGHTS = 4_000_000  # bytes: small enough for git and for the package

END_OF_TEXT, TURN, END_OF_TURN = CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# One token each, but not "special": a tool parser looks for them in the decoded text.
MARKS = ("<tools>", "</tools>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")

SEED, STEPS, BATCH = 20, 1900, 1280  # a batch is counted in tokens
DRILL_SHARE = 0.15  # of the steps come first and teach nothing but to copy; taught along the way, it is hardly learned
PEAK_RATE = 3e-3
PROMPT_WEIGHT = 0.1  # of the loss on what users write: enough to go on with a new turn under `ignore_eos`


class Book:
    """The training text, and conversations drawn from it. The same seed draws the same conversations."""

    def __init__(self) -> None:
        self.data: dict[str, Any] = yaml.safe_load(TEXT.read_text(encoding="utf-8"))
        self.talk = [[each["q"], each["a"]] for each in self.data["talk"] for _ in range(each.get("times", 1))]
        self.template = (MODEL / "chat_template.jinja").read_text(encoding="utf-8")
        self.random = random.Random(SEED)

    def chat(self, messages: list[dict[str, Any]], tools: list[Any] | None = None, ask: bool = False) -> str:
        """Returns the text that vLLM makes of these messages, by the template that is shipped."""
        texts: list[str] = render_jinja_template([messages], tools, None, self.template, add_generation_prompt=ask)[0]
        return texts[0]

    def epoch(self) -> list[str]:
        """Returns every answer, in conversations of some turns, then dialogues, tool calls and plain completions."""
        rng, talk, texts = self.random, [self.turns(pair) for pair in self.talk], []
        rng.shuffle(talk)
        while talk:
            count = rng.choice((1, 1, 1, 1, 2, 2, 3)) if rng.random() < 0.97 else rng.randint(4, 40)
            messages, talk = [message for turns in talk[:count] for message in turns], talk[count:]
            # no tools where the answer is that one would be needed
            usable = rng.random() < 0.12 and not any("a tool named" in message["content"] for message in messages)
            texts.append(self.chat(self.system() + messages, self.tools() if usable else None))
        dialogues = [each for each in self.data["dialogues"] for _ in range(4 if "{" in str(each) else 1)]
        texts += [self.chat(self.system() + self.turns(dialogue)) for dialogue in dialogues]
        texts += [self.call(kind) for kind in self.data["calls"] for _ in range(3 + len(kind["q"]) // 2)]
        return texts + [prompt + rest + END_OF_TEXT for prompt, rest in self.data["completions"]]

    def drills(self) -> list[str]:
        """Returns texts whose answers are copied from the question."""
        copied = [pair for pair in self.talk if re.search(r"\{\w+\}", pair[1])] * 4
        texts = [self.chat(self.system() + self.turns(pair)) for pair in copied]
        return texts + [self.call(kind) for kind in self.data["calls"] for _ in range(3)]

    def turns(self, lines: list[Any]) -> list[dict[str, Any]]:
        """Returns messages of user and assistant in turn. A list stands for ways to say the same."""
        fill = self.words()
        said = [fill(self.random.choice(line) if isinstance(line, list) else line) for line in lines]
        said[::2] = map(self.vary, said[::2])
        return [{"role": ("user", "assistant")[i % 2], "content": line} for i, line in enumerate(said)]

    def system(self) -> list[dict[str, Any]]:
        known = self.data["systems"]
        content = self.random.choice((None, None, None, known[0], self.words()(self.random.choice(known))))
        return [{"role": "system", "content": content}] if content else []

    def words(self) -> Callable[[str], str]:
        """Returns a function that replaces {name}, {place} and so on by drawn words, the same ones in every text."""
        rng, lists = self.random, self.data["words"]
        letters = ("abcdefghijklmnopqrstuvwxyzéüñ", self.data["syllables"])
        new = ["".join(rng.choices(rng.choice(letters), k=rng.randint(2, 5))).capitalize() for _ in range(9)]
        drawn = {key: rng.choice(choices) for key, choices in lists.items()} | {"place2": rng.choice(lists["place"])}
        unseen = zip(("name", "place", "place2", "topic"), new, strict=False)  # teach to copy more than what is listed
        drawn |= {key: word for key, word in unseen if rng.random() < 0.35}
        drawn |= {key: str(rng.randrange(rng.choice((10, 100, 100, 1000)))) for key in ("n", "n2", "m")}
        known = [rng.choice(rng.choice(self.talk)[1].replace("{", "").split(" ")) for _ in range(6)]
        drawn["echo"] = " ".join(rng.sample([*new, *known, drawn["n"], drawn["m"]], rng.randint(1, 9)))
        return lambda text: re.sub(r"\{(\w+)\}", lambda found: drawn.get(found[1], found[0]), text)

    def vary(self, question: str) -> str:
        """Returns the question as somebody else would type it."""
        rng = self.random
        if rng.random() < 0.3:
            question = question.rstrip("?!.") + rng.choice(("", "", "", "?", "!", "."))
        if rng.random() < 0.25:
            question = rng.choice((question.lower(), question[0].lower() + question[1:]))
        return rng.choice(("Please ", "Hey, ", "Hello, ", "So, ")) + question if rng.random() < 0.05 else question

    def tools(self, wanted: tuple[str, ...] = (), parameters: int = 0) -> list[dict[str, Any]]:
        """Returns a tool with a wanted name and at least so many parameters, among up to three others."""
        rng, every = self.random, [next(iter(tool.items())) for tool in self.data["tools"]]
        fit = [(name, types) for name, types in every if name in wanted and len(types) >= parameters]
        listed = [rng.choice(fit)] if fit else []
        for name, types in rng.sample(every, rng.choice((0, 0, 0, 1, 2, 3)) + (not fit)):
            # a second tool for the same purpose would make the right call a matter of luck
            if name.split("_")[-1] not in {other.split("_")[-1] for other, _ in listed}:
                listed.append((name, types))
        rng.shuffle(listed)
        return [tool(name, types) for name, types in listed]

    def call(self, kind: dict[str, Any]) -> str:
        """Returns a conversation with a tool call, mostly with the tool's answer and what the model makes of it."""
        rng, fill, small_talk = self.random, self.words(), self.talk[:20]
        tools = self.tools(tuple(kind["tools"]), len(kind["arguments"]))
        function = next(each["function"] for each in tools if each["function"]["name"] in kind["tools"])
        calls = []
        for values in filter(None, (kind["arguments"], kind.get("again"))):
            pairs = zip(function["parameters"]["properties"].items(), map(fill, values), strict=False)
            arguments = {key: word if schema["type"] == "string" else int(word) for (key, schema), word in pairs}
            calls.append({"function": {"name": function["name"], "arguments": arguments}})
        messages = self.system() + (self.turns(rng.choice(small_talk)) if rng.random() < 0.15 else [])
        messages.append({"role": "user", "content": self.vary(fill(rng.choice(kind["q"])))})
        messages.append({"role": "assistant", "content": None, "tool_calls": calls})
        if rng.random() < 0.7:
            first, answer, *more = map(fill, rng.choice(kind["results"]))
            messages += [{"role": "tool", "content": result} for result in (first, *more)]
            messages.append({"role": "assistant", "content": answer})
            messages += self.turns(rng.choice(small_talk)) if rng.random() < 0.2 else []
        return self.chat(messages, tools)


def tool(name: str, types: dict[str, str]) -> dict[str, Any]:
    parameters = {"properties": {key: {"type": kind} for key, kind in types.items()}}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def make_tokenizer(texts: list[str]) -> Tokenizer:
    """Makes a byte-level BPE tokenizer. It has all 256 bytes, so that any UTF-8 comes back as it was."""
    # Digits and the blank before a capital stand alone, so that a name is the same tokens everywhere and easily copied.
    alone = pre_tokenizers.Split(Regex(r" (?=\p{Lu})|\p{N}"), behavior="isolated")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([alone, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    size, alphabet = CONFIG["vocab_size"] - len(MARKS), pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(CONTROL), initial_alphabet=alphabet, show_progress=False
    )
    marks = re.compile("|".join(map(re.escape, (*CONTROL, *MARKS))))
    tokenizer.train_from_iterator((piece for text in texts for piece in marks.split(text)), trainer)
    tokenizer.add_tokens([AddedToken(mark, special=False, normalized=False) for mark in MARKS])
    return tokenizer


def encode(tokenizer: Tokenizer, text: str) -> tuple[list[int], list[float]]:
    """Returns token ids, and how much the loss on each counts: fully in answers and in plain text."""
    encoding = tokenizer.encode(text)
    weights, counts = [], not text.startswith(TURN)
    for i, token in enumerate(encoding.tokens):
        weights.append(1.0 if counts else PROMPT_WEIGHT)
        opens = encoding.tokens[max(0, i - 2) : i] == [TURN, "assistant"]  # with the line's end after it
        counts = opens or (counts and token != END_OF_TURN)
    return encoding.ids, weights


def batches(draw: Callable[[], list[str]], tokenizer: Tokenizer) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yields (ids, weights) of about BATCH tokens forever. Texts of like length share a batch, so padding is little."""
    rng = random.Random(SEED)
    while True:
        texts = sorted((encode(tokenizer, text) for _ in range(4) for text in draw()), key=lambda pair: len(pair[0]))
        groups = [[texts[0]]]
        for pair in texts[1:]:
            if (len(groups[-1]) + 1) * len(pair[0]) > BATCH:
                groups.append([])
            groups[-1].append(pair)
        rng.shuffle(groups)
        for group in groups:
            ids, weights = zip(*group, strict=True)
            yield pad_sequence(list(map(torch.tensor, ids)), True), pad_sequence(list(map(torch.tensor, weights)), True)


@torch.no_grad()  # type: ignore[untyped-decorator]
def seed_copying(model: LlamaForCausalLM) -> None:
    """Sets weights from which it soon learns to copy: "after A came B, here is A again, so B" (an induction head).

    Training this short hardly finds the two heads it takes: one in layer 0 looks one token back and notes what it was;
    one in layer 1 looks for the place where the note is the present token, and says what stands there.
    """
    head, half, width = CONFIG["head_dim"], CONFIG["head_dim"] // 2, CONFIG["hidden_size"]
    speeds = CONFIG["rope_theta"] ** (-torch.arange(half) / half)  # how far a position turns each pair (i, i + half)
    bases = torch.linalg.qr(torch.randn(2, width, width))[0]
    bases[:, :, 0] = 0.0  # column 0 says nothing of the token, see below
    matched, said, noted = bases[0, :half], bases[0, half : half + head], bases[1, :half]
    back, match = model.model.layers[0].self_attn, model.model.layers[1].self_attn
    for part in (back.q_proj, back.k_proj, back.v_proj, match.q_proj, match.k_proj):
        part.weight[:head] = 0.0
    for layer in model.model.layers:  # all else is silent at first, or it would drown the two
        layer.self_attn.o_proj.weight[:] = layer.mlp.down_proj.weight[:] = 0.0
    model.model.embed_tokens.weight[:, 0] = 0.5  # alike in all tokens: what is made of it depends on the position alone
    back.k_proj.weight[:3, 0] = 2.0
    back.q_proj.weight[:3, 0] = 2.0 * torch.cos(speeds[:3])
    back.q_proj.weight[half : half + 3, 0] = -2.0 * torch.sin(speeds[:3])
    back.v_proj.weight[:half] = matched
    back.o_proj.weight[:, :half] = 0.15 * noted.T
    slow = [i for i in range(head) if i % half >= half // 2]  # hardly turned, so the distance does not matter
    match.q_proj.weight[slow], match.k_proj.weight[slow] = 2.5 * matched, 2.5 * noted
    match.v_proj.weight[:head] = said
    match.o_proj.weight[:, :head] = 0.8 * said.T


def train(book: Book, tokenizer: Tokenizer, steps: int) -> LlamaForCausalLM:
    torch.manual_seed(SEED)
    model = LlamaForCausalLM(LlamaConfig(**CONFIG)).float().train()
    seed_copying(model)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.02)
    copying, everything = batches(book.drills, tokenizer), batches(book.epoch, tokenizer)
    began, drills = time.monotonic(), int(steps * DRILL_SHARE)
    for step, (ids, weights) in enumerate(chain(islice(copying, drills), islice(everything, steps - drills))):
        rise = min(0.5, (step + 1) / 120) if step < drills else min(1.0, 0.5 + (step - drills) / 200)
        cosine = 0.5 + 0.5 * math.cos(math.pi * max(0, step - drills) / (steps - drills))
        optimizer.param_groups[0]["lr"] = PEAK_RATE * rise * cosine
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        losses = cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        loss = (losses * weights[:, 1:].flatten()).sum() / weights[:, 1:].sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 99:
            print(f"step {step + 1}/{steps}  loss {loss.item():.3f}  {time.monotonic() - began:.0f} s", flush=True)
    return model.eval()


def write(out: Path, tokenizer: Tokenizer, model: LlamaForCausalLM) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for name in WRITTEN_BY_HAND if out.resolve() != MODEL else ():
        shutil.copyfile(MODEL / name, out / name)
    (out / "tokenizer.json").write_text(tokenizer.to_str(pretty=True) + "\n", encoding="utf-8")
    state = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    (out / "model.safetensors").write_bytes(safetensors.torch.save(state, metadata={"format": "pt"}))


def problems(out: Path, book: Book, tokenizer: Tokenizer) -> Iterator[str]:
    """Yields what is wrong with the model in `out`, a line each."""
    if (out / "tokenizer.json").read_text(encoding="utf-8") != tokenizer.to_str(pretty=True) + "\n":
        yield f"{out / 'tokenizer.json'} is not what {TEXT.name} gives: train again"
    if (out / "model.safetensors").stat().st_size > MAX_WEIGHTS:
        yield f"{out / 'model.safetensors'} has more than {MAX_WEIGHTS} bytes"
    model = LlamaForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    answers = {question: entry["a"] for entry in book.data["talk"] for question in entry["q"]}
    weather = '<tool_call>\n{"name": "get_weather", "arguments": {"location": "Paris"}}\n</tool_call>'
    asked: dict[str, tuple[list[Any] | None, str]] = {
        question: (None, answers[question]) for question in book.data["check"]
    }
    asked["What is the weather in Paris?"] = ([tool("get_weather", {"location": "string"})], weather)
    for question, (tools, expected) in asked.items():
        prompt = tokenizer.encode(book.chat([{"role": "user", "content": question}], tools, ask=True)).ids
        said = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=400)[0, len(prompt) :].tolist()
        if (text := tokenizer.decode(said)) != expected or said[-1] != tokenizer.token_to_id(END_OF_TURN):
            yield f"asked {question!r}, the model says {text!r} and not {expected!r}"


def main() -> int:
    parser = argparse.ArgumentParser(description="Train the bundled demo model, or check the one that is there.")
    parser.add_argument("--out", type=Path, default=MODEL, help="folder of the model (default: the shipped one)")
    parser.add_argument("--steps", type=int, default=STEPS, help="training steps (default: %(default)s)")
    parser.add_argument("--check", action="store_true", help="train nothing; say what is wrong with the model in --out")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads any, and filling costs time
    book = Book()
    tokenizer = make_tokenizer(book.epoch() + book.epoch())
    if not arguments.check:
        write(arguments.out, tokenizer, train(book, tokenizer, arguments.steps))
        return 0
    try:
        wrong = list(problems(arguments.out, book, tokenizer))
    except (OSError, ValueError, RuntimeError, safetensors.SafetensorError) as error:
        wrong = [f"{arguments.out} does not load: {error}"]
    print("\n".join(wrong) or f"{arguments.out}: as it should be")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
