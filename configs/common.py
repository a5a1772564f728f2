"""Settings that every job of a surgery shares: model, prompts, one section per stage.

A job's config is `get_config(model)` with its `job` set, so that jobs run one by one in the same workdir agree.
"""

from ml_collections import ConfigDict

MODELS = ("tiny", "wan_1_3b", "wan_14b")
WAN_NEGATIVE_PROMPT = (  # the original release's own
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，"
    "丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，"
    "静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)
PAPER_VIDEOS = tuple(f"{frames}x{size}" for size in ("320x480", "480x832") for frames in (81, 121, 161, 201))


def get_config(job: str, model: str) -> ConfigDict:
    """Returns all sections for `model`: the numbers of the paper, or ones that fit 2 CPU cores for `tiny`."""
    if model not in MODELS:
        raise ValueError(f"unknown model {model!r}; choose one of {', '.join(MODELS)}")
    tiny = model == "tiny"
    c = ConfigDict()
    c.job = job
    c.seed = 0

    c.model = ConfigDict()
    c.model.weights = "assets/wan-tiny" if tiny else ""  # pipeline folder: diffusers' layout or the original
    c.model.frames = 33 if tiny else 81  # 4n + 1
    c.model.height = 128 if tiny else 480  # multiples of 16
    c.model.width = 128 if tiny else 832
    c.model.compute_dtype = "float32" if tiny else "bfloat16"  # of activations; parameters are float32
    c.model.attention_backend = "auto"  # xla; tpu, gpu: fused kernels, slow anywhere else; auto: see ops/backends.py
    c.model.negative_prompt = "" if tiny else WAN_NEGATIVE_PROMPT  # of guidance

    c.prompts = ConfigDict()
    c.prompts.train = "assets/prompts/train.txt" if tiny else ""  # one prompt a line
    c.prompts.held_out = "assets/prompts/held_out.txt" if tiny else ""

    c.mesh = ConfigDict()  # how training uses several devices; what it computes doesn't depend on it
    c.mesh.data = 1  # distillation: ways to split the videos of a batch, both branches of guidance counted
    c.mesh.seq = 1  # ways to split tokens; distillation: while blocks train, the remaining devices go to blocks
    c.mesh.replicas = 0  # fine-tuning: copies of the weights, each split over its devices; 0: one per slice

    c.distill = ConfigDict()  # stage 1
    c.distill.rates = ("R2", "R4", "R8", "linear")  # what every block is distilled to
    c.distill.loss = "value"  # value (Eq. 7) or attention (Eq. 6)
    c.distill.feature_map = "poly"  # poly, elu, hedgehog
    c.distill.degree = 2  # P
    c.distill.layers = 2
    c.distill.hidden = 0  # width of a head's hidden layers; 0: P times the head's width, as in the paper
    c.distill.activation = "softplus"  # of the features: softplus, relu, exp, elu, square
    c.distill.shared = False  # one feature map for queries and keys
    c.distill.pattern = "stride"  # which tokens are softmax tokens: stride or lattice
    c.distill.stabiliser = "max"  # c_i: max or lse
    c.distill.prompts = 6 if tiny else 400  # trajectories; each is 50 training steps
    c.distill.batch = 1  # prompts per trajectory
    c.distill.branches = "both"  # of guidance, as training data: both, cond or uncond
    c.distill.activations = "inside"  # gradients inside the scan over blocks (inside), or block inputs kept (stacked)
    c.distill.embeddings = ""  # folder of text embeddings, see hybrid_dit/text_cache.py; empty: the stage's own
    c.distill.sample_steps = 50  # Euler-ancestral
    c.distill.guidance = 5.0
    c.distill.learning_rate = 1e-3
    c.distill.held_out_steps = 10 if tiny else 25  # of each held-out trajectory
    c.distill.held_out_prompts = 2 if tiny else 8  # for the errors that selection uses

    c.select = ConfigDict()  # stage 2
    c.select.rates = ("R2", "R4", "R8")  # candidates beside softmax (the paper's); distilled ones, linear if you like
    c.select.budget = "4R4" if tiny else "15R4"  # a name (15 blocks at R4), a share of softmax's cost, or an amount
    c.select.costs = "flops"  # flops (counted), timings (measured: 40ms is a budget then) or compiled (TPU's estimate)
    c.select.timings = ""  # for timings: CSV of the bench job, with columns label,seconds
    c.select.estimate = ""  # for compiled: JSON of configs/plan.py with --config.job=select

    c.finetune = ConfigDict()  # stage 3
    c.finetune.steps = 40 if tiny else 1000
    c.finetune.batch = 4 if tiny else 16
    c.finetune.learning_rate = 1e-4 if tiny else 1e-5
    c.finetune.schedule = "constant"  # after the warm-up: constant, or cosine (down to 0)
    c.finetune.warmup = 5 if tiny else 50
    c.finetune.learning_rates = (".*=1",)  # REGEX=FACTOR per group of parameters; 0 freezes; one rule for each path
    c.finetune.weight_decay = 0.01
    c.finetune.clip = 1.0  # global gradient norm; 0: none
    c.finetune.ema = 0.0  # decay of averaged weights, which are exported then; 0: none
    c.finetune.timesteps = "uniform"  # before the shift: uniform or logit_normal
    c.finetune.logit_mean = 0.0  # of logit_normal
    c.finetune.logit_std = 1.0
    c.finetune.shift = 0.0  # of timesteps; 0: the pipeline's
    c.finetune.teacher = 0.0  # weight of the squared distance to the teacher's velocity; 0: none
    c.finetune.drop_text = 0.1  # share of samples with the empty prompt
    c.finetune.videos = 48 if tiny else 0  # rendered moving shapes
    # From here on: may change when a run is continued.
    c.finetune.accumulate = 1  # parts that a batch is computed in, one after the other
    # What backward recomputes: none; block; attention: a block but attention, for as much memory as tokens x width per
    # block and kind of attention; dots: all but dense layers; auto: none or block, by size.
    c.finetune.remat = "auto"
    c.finetune.save_every = 20 if tiny else 100
    c.finetune.keep = 2  # checkpoints, beside the one with the lowest loss
    c.finetune.sample_every = 0  # steps between sample videos; 0: none
    c.finetune.sample_prompts = 2  # the first of the held-out ones; with sampler, steps and guidance of section sample
    c.finetune.profile = 0  # steps to trace for TensorBoard's profiler, after the first three

    c.data = ConfigDict()  # what stage 3 trains on, see docs/data.md
    c.data.kind = "shapes" if tiny else "tfds"  # tfds, parquet, tar, csv; shapes: finetune.videos, nothing else
    c.data.path = ""  # folder of the data
    c.data.buckets = ()  # shapes to train on, such as 81x480x832 (frames, height, width); empty: all there are
    c.data.scale = "auto"  # of latents on disk: normalised (the DiT's), raw (the VAE's), auto: what the kind has
    c.data.dtype = "float32" if tiny else "bfloat16"  # of batches
    # From here on: may change when a run is continued.
    c.data.text_rows = 0  # longest prompt in tokens; 0: the longest of the data, or all 512 if it doesn't tell
    c.data.max_bad = 100  # unusable samples that a process leaves out before it gives up
    c.data.threads = 2  # that prepare batches
    c.data.ahead = 2  # batches kept ready

    c.build_data = ConfigDict()  # makes a folder of the kind tfds
    c.build_data.videos = ""  # folder of videos; empty: moving shapes
    c.build_data.captions = ""  # CSV or JSONL of file,caption; empty: a .txt beside each video
    c.build_data.shapes = 64 if tiny else 0  # rendered scenes, if there are no videos
    c.build_data.buckets = ("33x128x128",) if tiny else ("81x480x832", "81x832x480", "81x624x624")
    c.build_data.fps = 16.0  # Wan's
    c.build_data.enlarge = 1.5  # smaller videos are left out
    c.build_data.shard = 32 if tiny else 256  # videos per file: what an interruption may cost
    c.build_data.batch = 1  # videos encoded at once on each device
    c.build_data.dtype = "bfloat16"  # of stored latents and text
    c.build_data.compute_dtype = "float32"  # of the VAE
    c.build_data.threads = 2  # that read videos
    c.build_data.process = 0  # which of `processes` this is, where several run without jax.distributed
    c.build_data.processes = 0  # 0: as jax.distributed says

    c.evaluate = ConfigDict()
    c.evaluate.prompts = 6 if tiny else 4  # the first of the held-out ones
    c.evaluate.sampler = "unipc"
    c.evaluate.sample_steps = 20 if tiny else 50
    c.evaluate.guidance = 3.0 if tiny else 6.0
    c.evaluate.batch = 3 if tiny else 1
    c.evaluate.velocity_steps = 5  # timesteps at which velocities are compared with the teacher's; 0: none

    c.sample = ConfigDict()
    c.sample.variant = "teacher"  # teacher (the weights as given) or finetuned (what surgery made of them)
    c.sample.prompt = ""  # one prompt; empty: those of the file
    c.sample.prompts = c.prompts.held_out  # file with one prompt a line
    c.sample.names = ""  # file with what to call each one's videos; empty: the prompts (VBench: the original prompts)
    c.sample.first = 6 if tiny else 0  # prompts of the file to sample; 0: all
    c.sample.samples = 1  # videos per prompt (VBench: 5)
    c.sample.sampler = "unipc"
    c.sample.sample_steps = 20 if tiny else 50
    c.sample.guidance = 3.0 if tiny else 6.0
    c.sample.interval = (0.0, 1000.0)  # timesteps that are guided (arXiv:2404.07724); outside, one branch is computed
    c.sample.reuse = 0.0  # keep the velocity while the time modulation has changed by less (try 0.1); 0: never
    c.sample.batch = 3 if tiny else 1  # videos at once; devices share them, and those left over share their tokens
    c.sample.sequential = not tiny  # guidance's branches one after the other: half the memory
    c.sample.windows = 0  # of columns, decoded one after the other to save memory; 0: what devices share, else 1
    c.sample.vae_dtype = "float32"  # of the VAE's activations; bfloat16 takes half the memory
    c.sample.fps = 16
    c.sample.share = "0/1"  # which part of the videos this process makes: NUMBER/PROCESSES, each on its own devices

    c.suite = ConfigDict()  # VBench or VBench-2.0: what the job sample makes then, and the job vbench checks
    c.suite.name = ""  # vbench or vbench2; empty: the prompts of the section sample
    c.suite.prompts = ""  # the suite's full_info.json, or its folder of one list per dimension
    c.suite.rewritten = ""  # list (or folder, one per dimension) of augmented prompts; files keep the original's name
    c.suite.originals = ""  # list (or folder) that the rewritten ones follow line by line; empty: that of prompts
    c.suite.dimensions = ()  # some only; empty: all
    c.suite.results = ()  # NAME=PATH of further results for the table: file, folder or zip of *_eval_results.json

    c.bench = ConfigDict()  # what is timed on one device
    c.bench.preset = "" if tiny else model  # sizes of the model if model.weights is empty
    c.bench.what = ("op", "attention", "block", "model")  # attention alone, with q, k, v, o, whole block, whole DiT
    c.bench.videos = tuple(f"{n}x128x128" for n in (9, 65)) if tiny else PAPER_VIDEOS  # of ops, beside the model's own
    c.bench.rates = ("R2", "R4", "R8", "linear")  # beside softmax; feature maps are those of section distill
    c.bench.models = ("softmax", "4R4") if tiny else ("softmax", "15R8")  # softmax, or blocks and rate
    # What is timed with gradients, too: kinds of `what`, and "videos", the ops of other videos than the model's.
    c.bench.backward = ("op",) if tiny else ("op", "videos", "attention", "block", "model")
    c.bench.dtypes = (c.model.compute_dtype,)  # float32, bfloat16
    c.bench.backends = ("xla", "fused")  # fused: the kernels for TPU or GPU, where they can be used
    c.bench.text_tokens = 32 if tiny else 512  # of the prompt
    c.bench.repeats = 3 if tiny else 5  # the median counts
    c.bench.warmup = 1  # calls before that

    c.report = ConfigDict()
    c.report.max_mb = 15.0  # of the page; videos are shrunk or left out beyond it
    return c
