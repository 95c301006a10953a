"""Lists the commands: what each does, with examples, and the function behind it."""

from __future__ import annotations

from veneer.cli.verb import ADAPT, CARRY, LOOK, MEASURE, Verb

FIRST = ("demo", "fit", "generate", "eval", "merge")  # what `veneer` alone shows

VERBS = {
    "demo": Verb(
        ADAPT,
        "Compare learning and forgetting of three methods on the built-in model, or teach a chat model.",
        ("veneer demo", "veneer demo --steps 20 --out runs/short", "veneer demo --model smollm2"),
        "veneer.verbs.demo.choice:demo",
    ),
    "fit": Verb(
        ADAPT,
        "Adapt a model to texts by any method, and measure learning and forgetting.",
        (
            "veneer fit --data notes.txt --out runs/notes",
            "veneer fit --model ./llama --data chats.jsonl --method dora --rank 16 --lr 2e-4",
            "veneer fit --config run.yaml --steps 500",
            'veneer fit --model ./llama --data calls.jsonl --add-tokens "<call>" --add-tokens "</call>"',
        ),
        "veneer.cli.run_verbs:fit",
        own=True,
    ),
    "fit-many": Verb(
        ADAPT,
        "Train several runs side by side on one base in memory, each as it would be alone.",
        (
            "veneer fit-many french.yaml formal.yaml",
            "veneer fit-many runs/*.yaml --model ./llama --steps 500",
        ),
        "veneer.cli.run_verbs:fit_many",
        own=True,
    ),
    "plan": Verb(
        ADAPT,
        "Forecast a training's memory and time; exit code 3 if it will not fit.",
        (
            "veneer plan --data notes.txt",
            "veneer plan --model ./llama --data chats.jsonl --method dora --rank 16",
            "veneer plan --config run.yaml --no-probe --json",
            "veneer plan --model ./llama-70b --length 2048 --data - --world-size 64 --shard",
        ),
        "veneer.cli.plan_verb:plan",
        own=True,
    ),
    "compare": Verb(
        ADAPT,
        "Compare methods at their own best rates, over seeds, with intervals and ties in words.",
        (
            "veneer compare --data builtin:prose --steps 100",
            "veneer compare --model ./llama --data chats.jsonl --methods full,lora,dora --seeds 5",
            "veneer compare --data notes.txt --test held_out.txt --methods lora/loraplus --centre lora=1e-3",
        ),
        "veneer.cli.search_verbs:compare",
        own=True,
    ),
    "rank": Verb(
        ADAPT,
        "Find the rank that a task needs, from one pilot or from trainings at rising ranks.",
        (
            "veneer rank --data builtin:prose --steps 100",
            "veneer rank --model ./llama --data chats.jsonl --most 128",
            "veneer rank --data notes.txt --form sweep --seeds 3",
        ),
        "veneer.cli.search_verbs:rank",
        own=True,
    ),
    "study": Verb(
        MEASURE,
        "Judge claims about learning and forgetting by a fixed protocol, on the built-in model or SmolLM2.",
        ("veneer study --quick", "veneer study --part smollm2", "veneer study --to docs/study"),
        "veneer.verbs.search.study:study",
    ),
    "generate": Verb(
        LOOK,
        "Continue a prompt by the base model and by adapters, side by side.",
        (
            'veneer generate "def area(" --adapter runs/notes',
            'veneer generate "The statement" --adapter runs/a --adapter runs/b@0.5 --tokens 100',
        ),
        "veneer.verbs.generate:generate",
    ),
    "chat": Verb(
        LOOK,
        "Talk with a model and adapters, and change them between two messages.",
        (
            "veneer chat --adapter runs/notes",
            "veneer chat --model ./llama --adapter formal=runs/a --adapter short=runs/b@0.5",
        ),
        "veneer.verbs.chat:chat",
    ),
    "inspect": Verb(
        LOOK,
        "Show an adapter's change of each layer, and whether a merge would keep it.",
        ("veneer inspect runs/notes", "veneer inspect runs/notes --json"),
        "veneer.verbs.inspect:inspect",
    ),
    "analyse": Verb(
        LOOK,
        "Analyse an adapter's ranks, energies and intruders, compare two, or save one without intruders.",
        (
            "veneer analyse runs/notes",
            "veneer analyse runs/a runs/b --json",
            "veneer analyse runs/notes --scale 0.3 --out calmer --data builtin:known",
        ),
        "veneer.verbs.analyse:analyse",
    ),
    "report": Verb(
        LOOK,
        "Write report.html, the page of a finished run, from the files in its folder.",
        ("veneer report runs/notes", 'veneer report runs/notes --measure --prompt "def area("'),
        "veneer.verbs.report:report",
    ),
    "data": Verb(
        LOOK,
        "Show texts as tokens, check them (exit code 3 if a check fails), or write them as token shards.",
        (
            "veneer data show chats.jsonl --model ./llama",
            "veneer data check chats.jsonl --valid held_out.jsonl --length 512",
            "veneer data prepare chats.jsonl --model ./llama --out shards",
        ),
        "veneer.cli.run_verbs:data",
        own=True,
    ),
    "methods": Verb(
        LOOK,
        "List methods, starts and optimisers, with options and papers.",
        ("veneer methods", "veneer methods lora --json"),
        "veneer.cli.listing:listing",
    ),
    "serve": Verb(
        LOOK,
        "Serve a base with any mixture of adapters behind OpenAI's interface, with a page.",
        (
            "veneer serve --demo",
            "veneer serve ./llama --adapters ./adapters --port 8000",
            "veneer serve --adapter french=runs/french --adapter formal=runs/formal --slots 16",
            "veneer serve --adapters ./adapters --batch requests.jsonl --out answers.jsonl",
        ),
        "veneer.cli.serve_verb:serve",
        own=True,
    ),
    "merge": Verb(
        CARRY,
        "Write adapters into a copy of their base; exit code 3 if rounding would lose them.",
        ("veneer merge runs/notes --out merged", "veneer merge runs/a@0.5 runs/b --out merged --dtype fp32"),
        "veneer.verbs.merge:merge",
    ),
    "export": Verb(
        CARRY,
        "Write base and adapters as one Hugging Face folder; exit code 3 if that loses them.",
        (
            "veneer export ./llama --adapter runs/notes --out exported --dtype fp16",
            "veneer export builtin --adapter runs/a@0.5 --adapter runs/b --out exported --shard-size 500MB",
            "veneer export ./llama --adapter runs/notes --out ollama --format gguf --dtype fp16",
        ),
        "veneer.verbs.export:export",
    ),
    "compress": Verb(
        CARRY,
        "Write a smaller model: linear layers of low rank, with ranks by predicted loss.",
        (
            "veneer compress builtin --keep 0.8 --out small",
            "veneer compress ./llama --keep 0.7 --data code.jsonl --out small --method svd-llm",
            "veneer compress ./llama --keep 0.8 --data code.jsonl --out dense --expand",
        ),
        "veneer.cli.run_verbs:compress",
        own=True,
    ),
    "combine": Verb(
        CARRY,
        "Make one plain LoRA adapter from several, weighted, or from one at a lower rank.",
        (
            "veneer combine runs/a@0.7 runs/b@0.3 --out mixed --rank 16",
            "veneer combine runs/a --out small --energy 0.9",
            "veneer combine runs/a runs/b --out mixed --how ties --rank 32",
        ),
        "veneer.verbs.combine:combine",
    ),
    "extract": Verb(
        CARRY,
        "Make a LoRA adapter of the difference between a fine-tuned model and its base.",
        (
            "veneer extract ./tuned --base ./llama --out adapter --rank 32",
            "veneer extract ./tuned --base ./llama --out adapter --energy 0.9",
        ),
        "veneer.verbs.combine:extract",
    ),
    "convert": Verb(
        CARRY,
        "Carry an adapter to or from PEFT, kohya, diffusers, torchtune, mlx-lm, LitGPT, vLLM.",
        (
            "veneer convert runs/notes --to vllm --out served",
            "veneer convert lora.safetensors --model ./llama --out adapter",
        ),
        "veneer.verbs.convert:convert",
    ),
    "push": Verb(
        CARRY,
        "Load an adapter into a running vLLM, and prove that it acts there; exit code 3 if not.",
        (
            "veneer push runs/notes http://localhost:8000 --out /shared/notes",
            "veneer push runs/notes http://gpu:8000 --out served --path /adapters/served --replace",
        ),
        "veneer.verbs.push.push:push",
        checks=True,
    ),
    "convert-config": Verb(
        CARRY,
        "Translate a run's settings from axolotl, LLaMA-Factory, torchtune or mlx-lm.",
        (
            "veneer convert-config axolotl.yml --out run.yaml",
            "veneer convert-config sft.yaml --tool llamafactory --json",
        ),
        "veneer.verbs.convert_config:convert_config",
    ),
    "eval": Verb(
        MEASURE,
        "Measure a base and its adapters on texts and benchmarks, side by side, with intervals.",
        (
            "veneer eval builtin --adapter runs/notes --data builtin:prose --data builtin:known",
            "veneer eval ./llama --adapter runs/a --adapter runs/b@0.75 --data new.jsonl --tasks arc_easy",
            "veneer eval ./llama --tasks my_task --task-folder ./tasks",
        ),
        "veneer.verbs.eval.evaluate:evaluate",
    ),
    "verify": Verb(
        MEASURE,
        "Check that an adapter is complete, loads and has an effect; exit code 3 if not.",
        ("veneer verify runs/notes", "veneer verify adapter --model ./llama --dtype bf16"),
        "veneer.verbs.verify:verify",
        checks=True,
    ),
    "doctor": Verb(
        MEASURE,
        "Check machine and installation by feature; exit code 3 if the core is broken.",
        ("veneer doctor", "veneer doctor --json"),
        "veneer.verbs.doctor:doctor",
        checks=True,
    ),
}
