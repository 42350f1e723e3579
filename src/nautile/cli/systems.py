"""The DeepSeek systems this library answers to, as a table. ``nautile guide`` and docs/guide.md are rendered from it.

Status is not written down but follows from what is listed: only `built`, only `missing`, or both.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class System:
    """One published system and what of it stands here today."""

    key: str
    """What to type after ``nautile guide``."""
    name: str
    """Name as published."""
    about: str
    """What it is, for a reader who has not met it."""
    papers: tuple[tuple[str, str], ...]
    """Its papers: title, arXiv id."""
    repository: str
    """Its official repository under github.com/deepseek-ai."""
    built: str = ""
    """What works here today; empty for nothing."""
    missing: str = ""
    """What does not; empty for nothing."""
    code: tuple[str, ...] = ()
    """Where it lives, relative to src/nautile."""
    planned: tuple[str, ...] = ()
    """The rooms that the missing part will be built in."""
    run: tuple[str, ...] = ()
    """Commands to try."""
    aliases: tuple[str, ...] = ()
    """Other names that people look for, mechanisms included."""

    @property
    def status(self) -> str:
        """``built``, ``partly`` or ``not yet``."""
        if not self.built:
            return "not yet"
        return "partly" if self.missing else "built"


_V3_REPORT = ("DeepSeek-V3 Technical Report", "2412.19437")

SYSTEMS: tuple[System, ...] = (
    System(
        key="moe",
        name="DeepSeekMoE",
        about="A mixture-of-experts layer with many small experts instead of a few large ones, and a few shared "
        "experts that every token visits, so that the routed ones can specialise instead of each relearning what is "
        "common.",
        papers=(
            (
                "DeepSeekMoE: Towards Ultimate Expert Specialization in Mixture-of-Experts Language Models",
                "2401.06066",
            ),
        ),
        repository="DeepSeek-MoE",
        built="the layer: fine-grained routed experts, shared experts, softmax and sigmoid scores, greedy and "
        "group-limited selection; trained from scratch as part of the deepseek_v3 family; the deepseek family loads, "
        "runs and saves DeepSeekMoE-16B checkpoints, which no other library has a class for",
        missing="training recipes of its own family and the device-level balance losses",
        code=(
            "models/deepseek_moe/model.py",
            "layers/moe/router.py",
            "layers/moe/experts.py",
            "layers/moe/dispatch.py",
            "layers/moe/balance.py",
        ),
        planned=("train/",),
        run=("nautile demo", "nautile plan moe-16b", "nautile pretrain v3-micro --train.steps 40"),
        aliases=("deepseekmoe", "deepseek-moe", "experts", "router"),
    ),
    System(
        key="v2",
        name="DeepSeek-V2",
        about="The model that introduced multi-head latent attention (MLA): keys and values are compressed into one "
        "small latent per token, beside one rotated key that all heads share. The cache becomes 93.3 % smaller than "
        "DeepSeek 67B's, and decoding can work on the latents directly.",
        papers=(("DeepSeek-V2: A Strong, Economical, and Efficient Mixture-of-Experts Language Model", "2405.04434"),),
        repository="DeepSeek-V2",
        built="MLA in the expanded form (training) and the absorbed form (decoding), which a test proves equal, "
        "with YaRN and a latent cache; the deepseek_v2 family loads, runs, converts and saves V2, V2-Lite and V2.5",
        missing="training recipes of its own family, the device-level and communication balance losses",
        code=("models/deepseek_v2/model.py", "layers/attention/mla.py", "layers/rope.py", "infer/cache.py"),
        planned=("train/",),
        run=("nautile plan v2-lite", "nautile check path/to/DeepSeek-V2-Lite", "nautile demo"),
        aliases=("mla", "deepseek-v2", "latent attention", "yarn"),
    ),
    System(
        key="v3",
        name="DeepSeek-V3",
        about="671 billion parameters, 37 billion of them active per token: MLA and DeepSeekMoE, experts balanced "
        "by a bias on the router's choice instead of a large auxiliary loss, multi-token prediction (MTP) as a "
        "second objective, and training in FP8.",
        papers=(_V3_REPORT,),
        repository="DeepSeek-V3",
        built="the architecture at any size, bias balancing, the sequence-wise balance loss, MTP with its loss, "
        "pre-training from scratch in float32 or bfloat16; published weights in and out, MTP modules included, in "
        "bfloat16 or block-wise FP8, and in the layout of the official demo code",
        missing="FP8 training, speculative decoding with the MTP module, long-context extension training, training on "
        "several machines",
        code=(
            "models/deepseek_v3/model.py",
            "models/deepseek_v3/config.py",
            "layers/mtp.py",
            "layers/moe/balance.py",
            "train/pretrain.py",
        ),
        planned=("ops/", "parallel/", "infer/"),
        run=(
            "nautile demo",
            "nautile pretrain v3-micro --out runs/first",
            "nautile convert path/to/DeepSeek-V3 DeepSeek-V3-bf16 --dtype bf16",
            "nautile plan v3-671b",
        ),
        aliases=("deepseek-v3", "mtp", "fp8", "multi-token prediction", "bias balancing", "v3.1"),
    ),
    System(
        key="r1",
        name="DeepSeek-R1",
        about="Reasoning learnt by reinforcement: GRPO on V3's base model with rewards that rules can check "
        "(R1-Zero), then cold-start data, a second round of RL, and distillation into small dense models.",
        papers=(
            ("DeepSeek-R1: Incentivizing Reasoning Capability in LLMs via Reinforcement Learning", "2501.12948"),
            ("DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models", "2402.03300"),
        ),
        repository="DeepSeek-R1",
        built="R1 and its six distills load, run, convert and save; their chat templates, `<think>` handling and "
        "recommended sampling are built in",
        missing="GRPO, rewards, cold start, the stages, and distillation",
        code=("models/llama/model.py", "models/qwen2/model.py", "text/thinking.py"),
        planned=("posttrain/", "grade/"),
        run=("nautile chat path/to/DeepSeek-R1-Distill-Qwen-1.5B", "nautile plan r1-distill-qwen-7b"),
        aliases=("deepseek-r1", "grpo", "r1-zero", "rl", "distillation"),
    ),
    System(
        key="v3.2",
        name="DeepSeek-V3.2-Exp",
        about="V3.1 with DeepSeek sparse attention (DSA): a light indexer scores all past tokens for each query, "
        "and MLA attends to the best 2048 of them only, so that long contexts cost little more than short ones.",
        papers=(("DeepSeek-V3.2: Pushing the Frontier of Open Large Language Models", "2512.02556"),),
        repository="DeepSeek-V3.2-Exp",
        built="the lightning indexer and sparse latent attention, dense with a mask where a whole prompt is read and "
        "gathered over the cache where it is continued; the deepseek_v32 family loads, runs, converts and saves; the "
        "indexers' loss, with dense warm-up and sparse training; kernels in Triton, which no GPU has run yet",
        missing="work that follows the selection instead of the length while training; RL and agents",
        code=(
            "layers/attention/indexer.py",
            "layers/attention/sparse_mla.py",
            "models/deepseek_v32/model.py",
            "ops/indexer_loss.py",
            "ops/index_logits.py",
        ),
        planned=("train/", "posttrain/"),
        run=("nautile plan v32-685b", "nautile pretrain v32-nano"),
        aliases=("v3.2-exp", "dsa", "sparse attention", "indexer", "deepseek-v3.2"),
    ),
    System(
        key="engram",
        name="Engram",
        about="Memory by look-up: hashes of the last few tokens pick rows of large embedding tables, which a gate "
        "mixes into the residual stream, so that facts need not be recomputed by layers of a network.",
        papers=(
            (
                "Conditional Memory via Scalable Lookup: A New Axis of Sparsity for Large Language Models",
                "2601.07372",
            ),
        ),
        repository="Engram",
        missing="the hash tables, the gate, and a model that uses them",
        planned=("layers/engram.py", "models/"),
        aliases=("conditional memory", "n-gram"),
    ),
    System(
        key="math-v2",
        name="DeepSeekMath-V2",
        about="Proofs that check themselves: a verifier trained to grade proofs, a meta-verifier that keeps the "
        "verifier honest, and a generator rewarded for proofs that survive both.",
        papers=(("DeepSeekMath-V2: Towards Self-Verifiable Mathematical Reasoning", "2511.22570"),),
        repository="DeepSeek-Math-V2",
        missing="verifier, meta-verifier, generator, and their loop",
        planned=("posttrain/", "grade/"),
        aliases=("deepseekmath-v2", "proof", "verifier"),
    ),
    System(
        key="ocr-2",
        name="DeepSeek-OCR 2",
        about="Reads a page into text: a visual encoder whose causal queries put the image's tokens into reading "
        "order, before a small mixture-of-experts decoder writes them down.",
        papers=(
            ("DeepSeek-OCR 2: Visual Causal Flow", "2601.20552"),
            ("DeepSeek-OCR: Contexts Optical Compression", "2510.18234"),
        ),
        repository="DeepSeek-OCR-2",
        missing="the encoder, the decoder's family, and reading a page",
        planned=("layers/vision/", "models/"),
        aliases=("ocr", "deepseek-ocr", "deepseek-ocr-2"),
    ),
    System(
        key="vl2",
        name="DeepSeek-VL2",
        about="A vision-language model: images of any shape are cut into tiles for a SigLIP encoder, and a "
        "DeepSeekMoE language model with MLA reads the tokens.",
        papers=(
            (
                "DeepSeek-VL2: Mixture-of-Experts Vision-Language Models for Advanced Multimodal Understanding",
                "2412.10302",
            ),
        ),
        repository="DeepSeek-VL2",
        missing="tiling, the vision encoder, the adaptor, and the model",
        planned=("layers/vision/", "models/"),
        aliases=("deepseek-vl2", "vision"),
    ),
    System(
        key="janus",
        name="Janus and JanusFlow",
        about="One transformer that both understands and draws images, with separate visual encoders for the two: "
        "Janus and Janus-Pro draw by predicting image tokens, JanusFlow by rectified flow.",
        papers=(
            ("Janus: Decoupling Visual Encoding for Unified Multimodal Understanding and Generation", "2410.13848"),
            (
                "JanusFlow: Harmonizing Autoregression and Rectified Flow for Unified Multimodal Understanding and "
                "Generation",
                "2411.07975",
            ),
            (
                "Janus-Pro: Unified Multimodal Understanding and Generation with Data and Model Scaling",
                "2501.17811",
            ),
        ),
        repository="Janus",
        missing="encoders, the image tokenizer, the flow head, and both models",
        planned=("layers/vision/", "models/"),
        aliases=("janusflow", "janus-pro", "image generation"),
    ),
    System(
        key="coder",
        name="DeepSeek-Coder",
        about="Dense code models (1.3 to 33 billion parameters) trained on whole repositories, files ordered by "
        "what they import, with fill-in-the-middle so that they complete code between two given parts.",
        papers=(
            (
                "DeepSeek-Coder: When the Large Language Model Meets Programming - The Rise of Code Intelligence",
                "2401.14196",
            ),
        ),
        repository="DeepSeek-Coder",
        built="fill-in-the-middle (prefix, suffix, middle) in the pre-training data and in generation; the published "
        "models load, run, convert and save (llama family)",
        missing="repository ordering, filters and deduplication of the code corpus, evaluation",
        code=("models/llama/model.py", "text/fim.py", "infer/llm.py"),
        planned=("data/", "eval/"),
        run=("nautile plan coder-6.7b", "nautile demo"),
        aliases=("deepseek-coder", "fim", "fill-in-the-middle"),
    ),
    System(
        key="coder-v2",
        name="DeepSeek-Coder-V2",
        about="V2's mixture-of-experts models taken from an intermediate checkpoint and trained on 6 trillion more "
        "tokens, mostly code in 338 languages, with a context of 128 thousand tokens.",
        papers=(
            (
                "DeepSeek-Coder-V2: Breaking the Barrier of Closed-Source Models in Code Intelligence",
                "2406.11931",
            ),
        ),
        repository="DeepSeek-Coder-V2",
        built="the published models load, run, convert and save (deepseek_v2 family), chat template and "
        "fill-in-the-middle included",
        missing="continued pre-training, long context, evaluation",
        code=("models/deepseek_v2/model.py", "text/fim.py"),
        planned=("data/", "train/", "eval/"),
        run=("nautile plan v2-236b",),
        aliases=("deepseek-coder-v2",),
    ),
    System(
        key="deepep",
        name="DeepEP",
        about="Communication for expert parallelism: sends each token to the machines of its experts and brings the "
        "results back, over NVLink and RDMA, in a high-throughput and a low-latency form.",
        papers=(_V3_REPORT,),
        repository="DeepEP",
        missing="all-to-all dispatch across processes; on one process the same seam is served by "
        "layers/moe/dispatch.py",
        planned=("parallel/", "compat/"),
        aliases=("expert parallelism", "all-to-all"),
    ),
    System(
        key="deepgemm",
        name="DeepGEMM",
        about="Matrix products in FP8 with fine-grained scales, plain and grouped for experts, compiled at first use.",
        papers=(_V3_REPORT,),
        repository="DeepGEMM",
        built="FP8 casts, dense and grouped FP8 and bfloat16 products and indexer logits with a plain-torch "
        "specification, in Triton and as CUDA C++ for Hopper; FP8 training; DeepGEMM's SM90 interface under its own "
        "names, whose tests pass on a CPU",
        missing="figures from a GPU: nothing has run on one yet; the SM100 set (FP4, packed scales, Mega MoE)",
        code=("ops/fp8_products.py", "ops/quantization.py", "ops/hopper/", "ops/fp8_linear.py", "compat/deep_gemm/"),
        planned=("ops/",),
        run=("nautile ops", "nautile bench kernels --quick", "nautile pretrain v3-micro --train.precision fp8"),
        aliases=("gemm", "quantisation"),
    ),
    System(
        key="flashmla",
        name="FlashMLA",
        about="Attention kernels for MLA on Hopper: decoding over a paged latent cache, dense and sparse (DSA), and "
        "prefill.",
        papers=(
            ("DeepSeek-V2: A Strong, Economical, and Efficient Mixture-of-Experts Language Model", "2405.04434"),
            ("DeepSeek-V3.2: Pushing the Frontier of Open Large Language Models", "2512.02556"),
        ),
        repository="FlashMLA",
        built="decoding over paged latents, dense and sparse over FP8 bytes, sparse prefill with a backward, training "
        "attention with heads of 192/128: plain-torch specifications, Triton, C++ for CPUs, CUDA C++ for Hopper's "
        "dense decoding; FlashMLA's SM90 interface under its own names, whose tests pass on a CPU",
        missing="figures from a GPU: nothing has run on one yet; an engine that keeps its cache in pages",
        code=("ops/paged_latents.py", "ops/sparse_prefill.py", "ops/split_kv.py", "ops/hopper/", "compat/flash_mla.py"),
        planned=("infer/",),
        run=("nautile bench kernels --only mla",),
        aliases=("flash-mla", "attention kernel"),
    ),
    System(
        key="dualpipe",
        name="DualPipe",
        about="A pipeline schedule that feeds micro-batches from both ends at once and hides communication behind "
        "the other direction's computation.",
        papers=(_V3_REPORT,),
        repository="DualPipe",
        missing="schedules, their simulator, and the runtime",
        planned=("parallel/pipeline/", "compat/"),
        aliases=("pipeline", "dualpipev"),
    ),
    System(
        key="3fs",
        name="3FS",
        about="The Fire-Flyer file system: training data, checkpoints and KV cache on the SSDs of many machines, "
        "with strong consistency by chain replication.",
        papers=(("Fire-Flyer AI-HPC: A Cost-Effective Software-Hardware Co-Design for Deep Learning", "2408.14158"),),
        repository="3FS",
        missing="the file system and its clients",
        planned=("fs/",),
        aliases=("file system", "fire-flyer", "smallpond"),
    ),
)
