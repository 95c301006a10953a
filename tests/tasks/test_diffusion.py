"""Text-to-image diffusion on a random pipeline and synthetic pictures of known answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support import senses, tiny

import veneer
from veneer import tasks
from veneer.data.reading import Reading
from veneer.data.row_files import Row
from veneer.errors import ConfigError, DataError
from veneer.models import pretrained
from veneer.runs.fit import fit
from veneer.runs.report import report
from veneer.tasks.senses import painting
from veneer.train.run import Run
from veneer.verbs.convert import convert

pytest.importorskip("diffusers")
NAME = "text-to-image"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("diffusion")
    senses.diffusion(root / "base")
    senses.coloured(root / "walls", 12)
    return root


def settings(place: Path, out: Path, **changed: Any) -> dict[str, Any]:
    given = {"batch": 6, "eval_every": 30, **changed}
    return senses.settings(place / "base", NAME, place / "walls", out, **given)


@pytest.fixture(scope="module")
def whole(place) -> Path:
    fit(Run.from_dict(settings(place, place / "run")), progress=False)
    return place / "run"


def opened(place: Path) -> tuple[Any, Any]:
    processor = pretrained.processor(str(place / "base"), tasks.get(NAME).PROCESSOR)
    model = pretrained.model(str(place / "base"), tasks.get(NAME).AUTO, torch.float32, CPU)
    return tasks.build(NAME, processor, Reading(length=64)), model


def examples(place: Path, task: Any) -> list[Any]:
    files = sorted((place / "walls").glob("*.png"))
    rows = [Row("image", {"image": str(f), "text": f.with_suffix(".txt").read_text()}, f.name) for f in files]
    return [task.pieces(task.encode(row), 64)[0] for row in rows]


def test_the_error_falls_and_the_caption_matters(place, whole):
    results = json.loads((whole / "results.json").read_text())
    assert results["after"]["valid"] < 0.8 * results["before"]["valid"]
    task, model = opened(place)
    veneer.load(model, whole / "adapter")
    own = examples(place, task)
    other = [{**e, "ids": own[(i + 1) % 3]["ids"]} for i, e in enumerate(own)]
    right, wrong = (task.measure(model, some, batch=6)[0].value for some in (own, other))
    assert right < wrong


def test_diffusers_and_kohya_files_open_with_equal_outputs(place, whole, tmp_path):
    from diffusers import StableDiffusionPipeline

    task, model = opened(place)
    veneer.load(model, whole / "adapter")
    given = {
        **task.inputs(task.collate(examples(place, task)[:3])),
        "timesteps": torch.tensor([10, 400, 900]),
    }
    with torch.no_grad():
        ours = model(**given)
    names = tmp_path / "names.txt"
    names.write_text("\n".join(n for n, _ in opened(place)[1].named_modules()))
    for program in ("diffusers", "kohya"):
        convert(str(whole / "adapter"), out=str(tmp_path / program), to=program)
        pipeline = StableDiffusionPipeline.from_pretrained(place / "base", safety_checker=None)
        plain = noise(pipeline, given)
        file = next((tmp_path / program).glob("*.safetensors"))
        pipeline.load_lora_weights(str(tmp_path / program), weight_name=file.name, local_files_only=True)
        theirs = noise(pipeline, given)
        assert torch.allclose(theirs, ours, atol=1e-4 * float(ours.abs().max())), program
        assert not torch.allclose(plain, ours, atol=1e-3)


@torch.no_grad()
def noise(pipeline: Any, given: dict[str, Any]) -> torch.Tensor:
    states = pipeline.text_encoder(given["input_ids"]).last_hidden_state
    found: torch.Tensor = pipeline.unet(
        given["latents"], given["timesteps"], encoder_hidden_states=states
    ).sample
    return found


def test_painting_is_that_of_the_pipeline(place):
    from diffusers import StableDiffusionPipeline

    task, model = opened(place)
    ids = torch.stack([task.ids("a red wall"), task.ids("a blue wall")])
    ours = painting.paint(model, task.processor, ids, task.ids(""), 5.0, steps=4, seed=3)
    pipeline = StableDiffusionPipeline.from_pretrained(place / "base", safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    start = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    theirs = pipeline(
        ["a red wall", "a blue wall"],
        latents=start,
        num_inference_steps=4,
        guidance_scale=5.0,
        output_type="pt",
    ).images
    assert torch.allclose(ours, theirs, atol=1e-3)


def test_the_report_shows_pictures_side_by_side(whole):
    assert report(str(whole), measure=True, progress=False)["missing"] == []
    page = (whole / "report.html").read_text(encoding="utf-8")
    assert page.count('src="data:image/png;base64,') == 12


def test_pictures_of_the_prior_have_their_weight(place, tmp_path):
    processor = opened(place)[0].processor
    task = tasks.build(NAME, processor, Reading(length=64), {"prior_weight": 0.25})
    (tmp_path / "prior").mkdir()
    picture = senses.picture("circle", 1)
    weights = []
    for path, more in (
        (tmp_path / "a.png", {}),
        (tmp_path / "prior" / "b.png", {}),
        (tmp_path / "c.png", {"prior": True}),
    ):
        picture.save(path)
        row = Row("image", {"image": str(path), "text": "a wall", **more}, path.name)
        weights.append(float(task.encode(row).content["weight"]))
    assert weights == [1.0, 0.25, 0.25]
    model = opened(place)[1]
    some = [task.pieces(task.encode(row), 64)[0]] * 2
    losses = []
    for weight in (1.0, 0.25):
        torch.manual_seed(0)
        batch = task.collate([{**e, "weight": torch.tensor(weight)} for e in some])
        losses.append(task.loss(model, batch)[0].item())
    assert losses[1] == pytest.approx(0.25 * losses[0], rel=1e-5)


def test_pictures_and_captions_must_come_in_pairs(place, tmp_path):
    folder = senses.coloured(tmp_path / "walls", 6)
    (folder / "01.txt").unlink()
    (folder / "02.png").unlink()
    (folder / "03.txt").write_text(" ")
    with pytest.raises(DataError) as e:
        fit(Run.from_dict(settings(place, tmp_path / "run", data=str(folder), valid="none")), progress=False)
    text = str(e.value)
    assert "01.png: 01.txt, the text beside it, is missing" in text and "03.txt: the file is empty" in text
    assert "02.txt: the image that it describes, 02.png or similar, is missing" in text
    assert not (tmp_path / "run").exists()


def test_other_pipelines_are_refused_at_the_door(place, tmp_path):
    tiny.base(tmp_path / "text")
    with pytest.raises(ConfigError, match=r"must hold a pipeline of diffusers; model_index.json is missing"):
        fit(Run.from_dict(settings(place, tmp_path / "run", model=str(tmp_path / "text"))), progress=False)
    (tmp_path / "xl").mkdir()
    parts = json.loads((place / "base" / "model_index.json").read_text())
    parts |= {"_class_name": "StableDiffusionXLPipeline", "text_encoder_2": ["transformers", "CLIPTextModel"]}
    (tmp_path / "xl" / "model_index.json").write_text(json.dumps(parts))
    with pytest.raises(
        ConfigError, match="got StableDiffusionXLPipeline; its adapters can be attached, saved"
    ):
        fit(Run.from_dict(settings(place, tmp_path / "run", model=str(tmp_path / "xl"))), progress=False)
