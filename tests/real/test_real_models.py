"""The converted real models do what they were trained for, and adapters leave them as they are."""

from __future__ import annotations

import json
import re
import wave

import pytest
import torch

import veneer
from veneer.errors import FormatError

pytestmark = pytest.mark.real


@torch.no_grad()
def answer(model, tokenizer, question: str) -> str:
    """Returns the greedy answer of a chat model."""
    messages = [{"role": "user", "content": question}]
    ids = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    written = model.generate(**ids, max_new_tokens=16, do_sample=False)
    return tokenizer.decode(written[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


def test_smollm2_answers_and_an_adapter_leaves_its_answer(real):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = real("smollm2")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    question = "What is the capital of France?"
    before = answer(model, tokenizer, question)
    assert "Paris" in before
    veneer.attach(model, "lora", rank=4)
    assert answer(model, tokenizer, question) == before
    n = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert n == 1_221_120


@pytest.mark.parametrize("saved", [torch.bfloat16, torch.float32])
def test_an_adapter_of_a_real_model_loads_in_both_precisions_and_not_on_another_base(real, saved, tmp_path):
    """The golden probe's limits hold on 30 blocks of real weights, and a scale that is off is still seen."""
    from transformers import AutoModelForCausalLM

    from veneer.adapt import probe
    from veneer.adapt.attached import changes

    def base(dtype):
        return AutoModelForCausalLM.from_pretrained(real("smollm2"), dtype=dtype).eval()

    model = veneer.attach(base(saved), "lora", rank=4, to=["q_proj", "v_proj", "down_proj"])
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, delta in changes(model, "default"):
            delta.B.copy_(torch.randn(delta.B.shape, generator=draw) * 0.15)
    veneer.save(model, tmp_path)
    kept = json.loads((tmp_path / "veneer.json").read_text())["probe"]
    for dtype in (torch.float32, torch.bfloat16):
        found = veneer.load(base(dtype), tmp_path)
        run = probe.through(found, "default")
        assert probe.check(found, run, kept) == []
        with torch.no_grad():
            for _, delta in changes(found, "default"):
                delta.B.mul_(2)
        assert probe.check(found, run, kept) != []
    other = base(torch.float32)
    with torch.no_grad():
        other.model.layers[7].mlp.up_proj.weight.mul_(1.2)
    with pytest.raises(FormatError, match="another base"):
        veneer.load(other, tmp_path)


def test_minilm_knows_which_sentences_are_alike(real):
    from transformers import AutoModel, AutoTokenizer

    folder = real("minilm")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    texts = [
        "I forgot my password.",
        "How do I reset my login?",
        "The cat sleeps on the sofa.",
        "A kitten naps.",
    ]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    vectors = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    alike = vectors @ vectors.T
    assert min(alike[0, 1], alike[2, 3]) > max(alike[0, 2:].max(), alike[1, 2:].max()) + 0.1


def words(text: str) -> list[str]:
    """Returns the words of a transcript in lower case."""
    return re.sub(r"[^a-z' ]", " ", text.lower()).split()


def test_whisper_reads_human_speech(real):
    from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration, WhisperTokenizerFast

    folder, speech = real("whisper"), real("speech")
    clip = sorted(speech.rglob("librivox/*.wav"))[0]
    (text,) = speech.rglob("librivox/transcription")
    said = next(line for line in text.read_text().splitlines() if clip.stem in line)
    with wave.open(str(clip)) as w:
        assert w.getframerate() == 16000
        sound = torch.frombuffer(bytearray(w.readframes(w.getnframes())), dtype=torch.int16) / 32768
    features = WhisperFeatureExtractor.from_pretrained(folder)(
        sound.numpy(), sampling_rate=16000, return_tensors="pt"
    )
    model = WhisperForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    ids = model.generate(features["input_features"], language="en", task="transcribe", max_new_tokens=80)
    heard = WhisperTokenizerFast.from_pretrained(folder).decode(ids[0], skip_special_tokens=True)
    expected = words(re.sub(r"\(.*?\)|</?s>", "", said))
    missing = [w for w in expected if w not in words(heard)]
    assert len(expected) > 5 and len(missing) <= 0.15 * len(expected)


@pytest.mark.parametrize(("picture", "index"), [("china.jpg", 698)])
def test_mobilenet_names_a_photograph(real, picture, index):
    datasets = pytest.importorskip("sklearn.datasets")
    from transformers import MobileNetV2ForImageClassification

    model = MobileNetV2ForImageClassification.from_pretrained(real("mobilenet")).eval()
    assert int(model(pixels(datasets.load_sample_image(picture))).logits.argmax()) == index


def test_dinov2_finds_a_picture_by_its_crop(real):
    datasets = pytest.importorskip("sklearn.datasets")
    from transformers import AutoModel

    model = AutoModel.from_pretrained(real("dinov2")).eval()
    found = []
    for name in ("china.jpg", "flower.jpg"):
        whole = datasets.load_sample_image(name)
        for part in (whole, whole[60:-60, 90:-90]):
            with torch.no_grad():
                found.append(model(pixels(part)).last_hidden_state[0, 0])
    alike = torch.nn.functional.cosine_similarity(torch.stack(found)[:, None], torch.stack(found), dim=-1)
    assert min(alike[0, 1], alike[2, 3]) > alike[:2, 2:].max()


def pixels(picture) -> torch.Tensor:
    """Returns a photograph as (1, 3, 224, 224), cropped and scaled as for ImageNet."""
    x = torch.tensor(picture).permute(2, 0, 1)[None].float() / 255
    h, w = x.shape[2:]
    side = 256 / min(h, w)
    x = torch.nn.functional.interpolate(
        x, size=(round(h * side), round(w * side)), mode="bilinear", antialias=True
    )
    h, w = x.shape[2:]
    x = x[:, :, (h - 224) // 2 : (h + 224) // 2, (w - 224) // 2 : (w + 224) // 2]
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (x - mean[:, None, None]) / deviation[:, None, None]


def test_function_calls_have_questions_and_answers_of_the_same_ids(real):
    data = real("bfcl") / "bfcl_eval/data"
    for part, rows in (("simple_python", 400), ("multiple", 200), ("parallel", 200)):
        asked, answered = (
            [json.loads(line)["id"] for line in (folder / f"BFCL_v4_{part}.json").read_text().splitlines()]
            for folder in (data, data / "possible_answer")
        )
        assert asked == answered and len(asked) == rows
