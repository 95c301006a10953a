"""Text-to-image on random pipelines of every kind and synthetic pictures of known answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support import pipelines, senses, tiny
from support.resuming import resumes_bit_for_bit

import veneer
from veneer import tasks
from veneer.data.reading import Reading
from veneer.data.row_files import Row
from veneer.errors import ConfigError, DataError, FormatError
from veneer.models import pretrained
from veneer.runs.fit import fit
from veneer.tasks.senses import painting
from veneer.train.run import Run
from veneer.verbs.convert import convert

diffusers = pytest.importorskip("diffusers")
NAME = "text-to-image"
CPU = torch.device("cpu")
CAPTIONS = ("a red wall", "a blue wall")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("diffusion")
    for kind in pipelines.KINDS:
        pipelines.save(kind, root / kind)
    senses.coloured(root / "walls", 12)
    senses.coloured(root / "known", 3)
    return root


each_kind = pytest.mark.parametrize("kind", pipelines.KINDS, scope="module")  # one kind after another


def settings(place: Path, kind: str, out: Path, **changed: Any) -> dict[str, Any]:
    own = {"batch": 6, "steps": 45, "eval_every": 45, "options": {"rank": 8, "alpha": 32}}
    given = {**own, "known": str(place / "known"), **changed}
    return senses.settings(place / kind, NAME, place / "walls", out, **given)


@pytest.fixture(scope="module")
def whole(place, kind, tmp_path_factory) -> Path:
    """The folder of one training of the kind."""
    given = settings(place, kind, tmp_path_factory.mktemp("whole") / "run", report=True)
    return fit(Run.from_dict(given), progress=False).folder


def opened(folder: Path, **options: Any) -> tuple[Any, Any]:
    processor = pretrained.processor(str(folder), tasks.get(NAME).PROCESSOR)
    model = pretrained.model(str(folder), tasks.get(NAME).AUTO, torch.float32, CPU)
    return tasks.build(NAME, processor, Reading(length=64), options), model


def examples(place: Path, task: Any) -> list[Any]:
    files = sorted((place / "walls").glob("*.png"))
    rows = [Row("image", {"image": str(f), "text": f.with_suffix(".txt").read_text()}, f.name) for f in files]
    return [task.pieces(task.encode(row), 64)[0] for row in rows]


def painted(task: Any, model: Any, **changed: Any) -> torch.Tensor:
    """Two pictures in four steps."""
    each = [task.conditions(c) for c in CAPTIONS]
    given = {key: torch.stack([e[key] for e in each]) for key in each[0]}
    own = {"guidance": task.guidance, "side": task.side, "steps": 4, "seed": 3, **changed}
    return painting.paint(model, task.processor, given, task.conditions(""), **own)


def theirs(pipeline: Any, guidance: float) -> torch.Tensor:
    """The same pictures by diffusers' pipeline."""
    pipeline.set_progress_bar_config(disable=True)
    start = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    own: dict[str, Any] = {"latents": start}
    if type(pipeline).__name__ == "FluxPipeline":
        tokens = pipeline._pack_latents(start, 2, 4, 8, 8)
        own = {"latents": tokens, "height": 16, "width": 16, "max_sequence_length": pipelines.LENGTH}
    steps = {"num_inference_steps": 4, "guidance_scale": guidance, "output_type": "pt"}
    found: torch.Tensor = pipeline([*CAPTIONS], **own, **steps).images
    return found


def pipeline_of(place: Path, kind: str) -> Any:
    return getattr(diffusers, f"{kind}Pipeline").from_pretrained(place / kind)


@each_kind
def test_the_error_falls_and_the_caption_matters(place, whole, kind):
    results = json.loads((whole / "results.json").read_text())
    assert results["after"]["valid"] < 0.85 * results["before"]["valid"]
    strengths = [point["target_noise_error"] for point in results["dial"]["points"]]
    assert len({*strengths}) == len(strengths) > 2
    task, model = opened(place / kind)
    veneer.load(model, whole / "adapter")
    right, *wrong = (error(task, model, examples(place, task), shift) for shift in range(3))
    assert min(wrong) > 1.03 * right


@torch.no_grad()
def error(task: Any, model: Any, some: list[Any], shift: int) -> float:
    """Returns the error under strong noise, with the captions moved by so many of the three colours."""
    given = dict(task.collate(some))
    moved = {key: given[key].roll(shift, 0) for key in given if key.startswith(("ids", "frame"))}
    noise = torch.randn(given["mean"].shape, generator=torch.Generator().manual_seed(0))
    places = torch.arange(700, 940, 240 // len(some))
    return float(task.errors(model, given["mean"], noise, places, moved).mean())


@each_kind
def test_painting_is_that_of_the_pipeline(place, kind):
    task, model = opened(place / kind)
    expected = theirs(pipeline_of(place, kind), task.guidance)
    assert torch.allclose(painted(task, model), expected, atol=1e-4)
    assert not torch.allclose(painted(task, model, guidance=1.0), expected, atol=1e-3)


@each_kind
def test_files_open_in_diffusers_with_equal_pictures(place, whole, kind, tmp_path):
    task, model = opened(place / kind)
    plain = painted(task, model)
    veneer.load(model, whole / "adapter")
    ours = painted(task, model)
    assert not torch.allclose(plain, ours, atol=1e-2)
    for program in ("diffusers", "kohya")[: 1 if kind == "Flux" else 2]:
        convert(str(whole / "adapter"), out=str(tmp_path / program), to=program)
        pipeline, file = pipeline_of(place, kind), next((tmp_path / program).glob("*.safetensors"))
        pipeline.load_lora_weights(str(tmp_path / program), weight_name=file.name, local_files_only=True)
        assert torch.allclose(theirs(pipeline, task.guidance), ours, atol=2e-3), program


@each_kind
def test_files_of_other_programs_are_read_back(place, whole, kind, tmp_path):
    from safetensors.torch import load_file

    task, model = opened(place / kind)
    veneer.load(model, whole / "adapter")
    ours = painted(task, model)
    for program in ("diffusers", "kohya")[: 1 if kind == "Flux" else 2]:
        convert(str(whole / "adapter"), out=str(tmp_path / program), to=program)
        file = next((tmp_path / program).glob("*.safetensors"))
        clips = [n for n in load_file(file) if n.startswith(("text_encoder.", "lora_te"))]
        # The names that other programs know.
        assert clips and all("text_model" in n or "text_projection" in n for n in clips)
        back = tmp_path / f"{program}-back"
        convert(str(file), out=str(back), to="peft", model=str(place / kind))
        again = opened(place / kind)[1]
        veneer.load(again, back)
        assert torch.allclose(painted(task, again), ours, atol=2e-3), program


def test_kohya_has_no_names_for_flux(place, tmp_path):
    _, model = opened(place / "Flux")
    veneer.attach(model, "lora", rank=2, to=r"transformer\..*to_q")
    veneer.save(model, tmp_path / "adapter", allow=("zero",))
    with pytest.raises(FormatError, match=r"kohya's format names the layers of Flux .* use to='diffusers'"):
        convert(str(tmp_path / "adapter"), out=str(tmp_path / "kohya"), to="kohya")
    assert not (tmp_path / "kohya").exists()


@each_kind
def test_the_report_shows_pictures_side_by_side(whole, kind):
    page = (whole / "report.html").read_text(encoding="utf-8")
    assert page.count('src="data:image/png;base64,') == 12


@each_kind
def test_it_resumes_after_a_kill_bit_for_bit(place, kind, tmp_path, monkeypatch):
    given = settings(place, kind, tmp_path / "run", steps=4, eval_every=2)
    resumes_bit_for_bit(given, tmp_path / "reference", monkeypatch, 3)


@each_kind
def test_every_adapted_layer_learns(place, whole, kind):
    _, model = opened(place / kind)
    veneer.load(model, whole / "adapter")
    changed = {key: p for key, p in model.named_parameters() if key.endswith(".B")}
    assert changed and all(p.any() for p in changed.values())


@each_kind
def test_pictures_of_the_prior_have_their_weight(place, kind, tmp_path):
    task, model = opened(place / kind, prior_weight=0.25)
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
    some = [task.pieces(task.encode(row), 64)[0]] * 2
    losses = []
    for weight in (1.0, 0.25):
        torch.manual_seed(0)
        batch = task.collate([{**e, "weight": torch.tensor(weight)} for e in some])
        losses.append(task.loss(model, batch)[0].item())
    assert losses[1] == pytest.approx(0.25 * losses[0], rel=1e-5)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_what_a_unet_predicts(tmp_path, prediction):
    folder = pipelines.save("StableDiffusion", tmp_path / "StableDiffusion", prediction=prediction)
    task, model = opened(folder)
    expected = theirs(pipeline_of(tmp_path, "StableDiffusion"), task.guidance)
    assert torch.allclose(painted(task, model), expected, atol=1e-4)
    schedule = task.processor.kind.schedule
    x, noise = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    times = torch.tensor([10, 400, 900])
    noisy, target = schedule.noised(x, noise, times)
    share = torch.cumprod(1 - torch.linspace(1e-4, 2e-2, 1000), 0)[times].view(-1, 1, 1, 1)
    assert torch.allclose(noisy, share.sqrt() * x + (1 - share).sqrt() * noise, atol=1e-5)
    velocity = share.sqrt() * noise - (1 - share).sqrt() * x
    assert torch.allclose(target, noise if prediction == "epsilon" else velocity, atol=1e-5)


def test_xl_takes_the_size_and_the_cut_of_a_picture(place, tmp_path):
    from PIL import Image

    task, _ = opened(place / "StableDiffusionXL")
    Image.new("RGB", (40, 20)).save(tmp_path / "wide.png")
    row = Row("image", {"image": str(tmp_path / "wide.png"), "text": "a wall"}, "wide.png")
    assert task.encode(row).content["frame"].tolist() == [20, 40, 0, 8, 16, 16]


def test_the_target_of_a_flow_is_its_velocity(place):
    """Noisy latents move from the picture to the noise, by the target for every unit of time."""
    schedule = opened(place / "Flux")[0].processor.kind.schedule
    x, noise = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    start, half = (schedule.noised(x, noise, torch.full((2,), t)) for t in (0.0, 500.0))
    assert torch.equal(start.latents, x)
    assert torch.allclose(half.latents - start.latents, 0.5 * half.target, atol=1e-6)
    assert torch.allclose(x + half.target, noise, atol=1e-6)


@pytest.mark.parametrize("dynamic", [True, False])
def test_times_of_a_flow_are_shifted_as_the_pipeline_shifts_its_own(tmp_path, dynamic):
    """The median of the logit-normal draw is 1/2, and diffusers' sampler shifts a step at 1/2."""
    folder = pipelines.save("Flux", tmp_path / "flux", dynamic=dynamic)
    schedule = opened(folder)[0].processor.kind.schedule
    for tokens in (16, 4096):
        sampled = schedule.sampler(2, tokens).timesteps  # of 1 and 1/2
        drawn = schedule.times(torch.arange(schedule.positions), tokens)
        assert float(drawn[499:501].mean()) == pytest.approx(float(sampled[1]), rel=1e-4)
        assert bool((drawn.diff() > 0).all()) and 0 < float(drawn[0]) and float(drawn[-1]) < 1000
    expected = 1000 / (1 + 2.718281828459045**-1.15) if dynamic else 500.0
    assert float(drawn[499:501].mean()) == pytest.approx(expected, rel=1e-4)


def test_flux_without_a_guidance_input(tmp_path, place):
    """As FLUX.1-schnell: no shift, and the scale of guidance changes nothing."""
    folder = pipelines.save("Flux", tmp_path / "Flux", dynamic=False, guidance_embeds=False)
    task, model = opened(folder)
    assert torch.allclose(painted(task, model), theirs(pipeline_of(tmp_path, "Flux"), 0.0), atol=1e-4)
    total, n = task.loss(model, task.collate(examples(place, task)[:2]))
    assert n == 2 and torch.isfinite(total)


@pytest.mark.parametrize("kind", ["Flux"])
def test_flux_learns_without_guidance(place, kind):
    task, model = opened(place / kind)
    given = task.inputs(task.collate(examples(place, task)[:2]))
    times, conditions = torch.tensor([300.0, 700.0]), {k: given[k] for k in ("ids", "ids_2")}
    with torch.no_grad():
        states = model.kind.states(model, conditions)
        found = model(given["latents"], times, **conditions)
        own, guided = (
            model.kind.prediction(model, given["latents"], times, states, scale) for scale in (1.0, 3.5)
        )
    assert torch.allclose(found, own, atol=1e-5) and not torch.allclose(found, guided, atol=1e-3)


@pytest.mark.parametrize("kind", ["Flux"], scope="module")
def test_t5_stays_frozen(place, whole, kind, tmp_path):
    names = json.loads((whole / "adapter" / "adapter_config.json").read_text())["target_modules"]
    assert not [n for n in names if n.startswith("text_encoder_2")]
    run = settings(place, kind, tmp_path / "run", to=r".*\.q")
    with pytest.raises(ConfigError, match=r"text_encoder_2 \(T5\) must stay frozen.* give exclude"):
        fit(Run.from_dict(run), progress=False)
    assert not (tmp_path / "run").exists()


def test_the_side_of_pictures(place):
    task, model = opened(place / "Flux", side=24)
    example = examples(place, task)[0]
    assert example["mean"].shape == (4, 12, 12)
    assert painted(task, model).shape == (2, 3, 24, 24)
    with pytest.raises(ConfigError, match="side must be a multiple of 4 pixels, got 18"):
        opened(place / "Flux", side=18)


def test_pictures_and_captions_must_come_in_pairs(place, tmp_path):
    folder = senses.coloured(tmp_path / "walls", 6)
    (folder / "01.txt").unlink()
    (folder / "02.png").unlink()
    (folder / "03.txt").write_text(" ")
    given = settings(place, "StableDiffusion", tmp_path / "run", data=str(folder), valid="none")
    with pytest.raises(DataError) as e:
        fit(Run.from_dict(given), progress=False)
    text = str(e.value)
    assert "01.png: 01.txt, the text beside it, is missing" in text and "03.txt: the file is empty" in text
    assert "02.txt: the image that it describes, 02.png or similar, is missing" in text
    assert not (tmp_path / "run").exists()


def test_bad_pictures_and_captions_are_named_by_row(place, tmp_path):
    good = place / "walls" / "00.png"
    (tmp_path / "cut.png").write_bytes(good.read_bytes()[:60])
    (tmp_path / "text.png").write_text("no picture")
    rows: list[dict[str, Any]] = [
        {"image": str(good), "text": "a red wall"},
        {"image": "cut.png", "text": "a wall"},
        {"image": "text.png", "text": "a wall"},
        {"image": "lost.png", "text": "a wall"},
        {"image": str(good), "text": "  "},
        {"image": str(good), "text": 3},
    ]
    data = tiny.jsonl(tmp_path / "rows.jsonl", *rows)
    for part in ("data", "valid"):
        given = settings(place, "StableDiffusion", tmp_path / "run", **{part: str(data)})
        with pytest.raises(DataError) as e:
            fit(Run.from_dict(given), progress=False)
        text = str(e.value)
        for line, says in (
            (2, f"the image {tmp_path / 'cut.png'} must be a picture that decodes"),
            (3, f"the image {tmp_path / 'text.png'} must be a picture that decodes"),
            (4, f"the image {tmp_path / 'lost.png'} does not exist"),
            (5, "'text' must be the caption of the picture, got '  '"),
            (6, "'text' must be the caption of the picture, got 3"),
        ):
            assert f"rows.jsonl line {line}: {says}" in text, line
        assert "line 1:" not in text and not (tmp_path / "run").exists()


def refused(place: Path, folder: Path, out: Path) -> str:
    with pytest.raises(ConfigError) as e:
        fit(Run.from_dict(settings(place, "Flux", out, model=str(folder))), progress=False)
    assert not out.exists()
    return str(e.value)


def test_other_pipelines_are_refused_at_the_door(place, tmp_path):
    tiny.base(tmp_path / "text")
    text = refused(place, tmp_path / "text", tmp_path / "run")
    assert "must hold a pipeline of diffusers; model_index.json is missing" in text
    (tmp_path / "sd3").mkdir()
    parts = json.loads((place / "Flux" / "model_index.json").read_text())
    parts |= {
        "_class_name": "StableDiffusion3Pipeline",
        "transformer": ["diffusers", "SD3Transformer2DModel"],
        "text_encoder_3": ["transformers", "T5EncoderModel"],
    }
    (tmp_path / "sd3" / "model_index.json").write_text(json.dumps(parts))
    text = refused(place, tmp_path / "sd3", tmp_path / "run")
    assert "trains the parts of FluxPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline" in text
    assert "got StableDiffusion3Pipeline; its adapters can be attached, saved" in text
    (tmp_path / "xl").mkdir()
    parts = json.loads((place / "StableDiffusionXL" / "model_index.json").read_text())
    parts["text_encoder"] = [None, None]
    (tmp_path / "xl" / "model_index.json").write_text(json.dumps(parts))
    text = refused(place, tmp_path / "xl", tmp_path / "run")
    assert "got StableDiffusionXLPipeline without text_encoder" in text


@pytest.mark.parametrize(
    ("file", "change", "says"),
    [
        ("transformer/config.json", {"in_channels": 64}, "must take the VAE's 4 channels, got 16"),
        ("scheduler/scheduler_config.json", {"_class_name": "DDIMScheduler"}, "FlowMatchEulerDiscrete"),
    ],
)
def test_settings_that_do_not_fit_are_refused(place, tmp_path, file, change, says):
    import shutil

    shutil.copytree(place / "Flux", tmp_path / "flux")
    path = tmp_path / "flux" / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    assert says in refused(place, tmp_path / "flux", tmp_path / "run")
    path.write_text("{")
    assert "must be readable JSON" in refused(place, tmp_path / "flux", tmp_path / "run")
