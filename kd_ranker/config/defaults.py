"""Every knob, with the value it has unless a dataset's config says otherwise."""

from ml_collections import ConfigDict

from kd_ranker.errors import UserError


def get_config() -> ConfigDict:
    """The defaults that the configs beside this file start from."""
    config = ConfigDict()
    config.seed = 0  # of the initialisation, of students and teacher
    config.tasks = ("watch", "like", "share")
    config.value_weights = (1.0, 2.0, 4.0)  # a ranker sorts by the weighted sum of probabilities

    config.data = ConfigDict()
    config.data.name = ""
    config.data.path = ""  # raw files, where the dataset is made from some
    config.data.dir = "datasets"  # where built datasets live
    config.data.seed = 0  # of the dataset itself, whatever is trained on it
    config.data.history_length = 20

    config.funnel = ConfigDict()
    config.funnel.retrieved = 2000
    config.funnel.passed = 200
    config.funnel.shown = 10
    config.funnel.report_at = (10, 50, 100, 200, 400)  # the k of survival@k and its like

    config.batch = ConfigDict()
    config.batch.requests = 32
    config.batch.candidates = 128  # a request
    config.batch.passed_share = 0.5  # of the slots that the shown candidates leave
    config.batch.negative_rate = 1.0  # share of the shown candidates without a positive to keep
    config.batch.seed = 0  # of the order of the data and the draws of candidates
    config.batch.order = "shuffled"  # of the requests of an epoch; or time

    config.student = ConfigDict()
    config.student.name = "multi_interest"
    config.student.width = 32  # of embeddings
    config.student.interests = 4  # user embeddings a request
    config.student.hidden = (64,)
    config.student.table_scale = 0.05  # standard deviation of fresh embedding rows
    config.student.user_rows = 0  # hash user ids into so many rows; 0: each id has its own
    config.student.item_rows = 0  # the same of item ids
    config.student.category_rows = 0  # and of category ids, those of all features together
    config.student.compute_dtype = "float32"  # or bfloat16; parameters and tables stay float32

    config.distill = ConfigDict()
    config.distill.mode = "shared"
    config.distill.weight = 1.0
    config.distill.loss = "bce"  # or mse_logit, softmax, ranknet, lambda, topk; their sizes differ
    config.distill.temperature = 1.0
    config.distill.top_k = 10  # loss topk: so many of a request's candidates in the batch
    config.distill.affine = True  # mode shared: a learned scale and offset between the two labels
    config.distill.serve = "user"  # mode aux: the heads that rank (user, teacher, blend)

    config.optimizer = _optimizer()

    config.train = _train(steps=1500)

    config.teacher = ConfigDict()
    config.teacher.name = "final_ranker"
    config.teacher.source = "live"  # or logged
    config.teacher.workdir = ""  # of train_teacher; with source logged, "" takes the dataset's logs
    config.teacher.stage = "retrieved"  # who meets the teacher: all retrieved, or only the passed
    # Of a logged teacher from elsewhere; 0: as many as the model has that the keys below describe.
    config.teacher.flops_per_candidate = 0.0
    config.teacher.width = 32
    config.teacher.attention_hidden = 16
    config.teacher.cross_layers = 2
    config.teacher.experts = 4
    config.teacher.expert_hidden = 64
    config.teacher.table_scale = 0.05
    config.teacher.user_rows = 0
    config.teacher.item_rows = 0
    config.teacher.category_rows = 0
    config.teacher.compute_dtype = "float32"
    config.teacher.batch = ConfigDict()
    config.teacher.batch.requests = 128
    config.teacher.batch.candidates = 10
    config.teacher.batch.passed_share = 1.0
    config.teacher.batch.negative_rate = 1.0
    config.teacher.batch.seed = 0
    config.teacher.batch.order = "shuffled"
    config.teacher.optimizer = _optimizer()
    config.teacher.train = _train(steps=1500)

    config.evaluation = ConfigDict()
    config.evaluation.requests = 16  # a batch
    config.evaluation.limit = 0  # how many requests of the test split to read; 0 reads all

    config.parallel = ConfigDict()
    config.parallel.mapping = "pmap"  # or shard_map
    config.parallel.devices = 0  # how many to use; 0 takes all

    config.sweep = ConfigDict()
    config.sweep.modes = ("none", "aux", "shared")
    config.sweep.losses = ()  # of this and the other empty ones: () takes the config's own value
    config.sweep.weights = (1.0,)
    config.sweep.temperatures = ()
    config.sweep.learning_rates = ()  # of dense parameters; the tables' rate keeps its ratio
    config.sweep.seeds = (0,)  # of the initialisation
    config.sweep.data_seeds = ()  # each repeats the whole sweep over another order of the data
    config.sweep.group_size = 0  # members that train in one program; 0: as many as memory allows
    config.sweep.extend = False  # add the members that a finished sweep does not have yet
    return config


def check_variant(variant: str, *known: str) -> None:
    """Raises UserError for a `:variant` that a config does not have; "" is the default."""
    if variant and variant not in known:
        names = ", ".join(f":{name}" for name in known) or "none"
        raise UserError(f"there is no variant :{variant}; the variants are: {names}")


def _optimizer() -> ConfigDict:
    optimizer = ConfigDict()
    optimizer.name = "adam"  # of the dense parameters
    optimizer.learning_rate = 2e-3
    optimizer.weight_decay = 0.0
    optimizer.table_name = "adam"  # of the embedding rows
    optimizer.table_learning_rate = 2e-3
    optimizer.table_weight_decay = 0.0
    optimizer.schedule = "cosine"  # to zero over train.steps; or constant
    optimizer.warmup_steps = 50
    return optimizer


def _train(steps: int) -> ConfigDict:
    train = ConfigDict()
    train.steps = steps
    train.log_every = 50
    train.checkpoint_every = 500
    train.eval_every = 500  # 0: only at the end
    train.eval_limit = 64  # requests of an evaluation during training
    return train
