from .distillation import DistillConfig as DistillConfig, distill as distill
from .evaluation import EvalConfig as EvalConfig, evaluate as evaluate
from .fixed_point import fixed_point_iter as fixed_point_iter
from .gradients import equilibrium as equilibrium, unroll as unroll, unroll_constant as unroll_constant
from .jacobian import jacobian_penalty as jacobian_penalty, spectral_radius as spectral_radius
from .lab.checkpoints import create_model as create_model, create_teacher as create_teacher
from .lab.checkpoints import list_models as list_models, load_checkpoint as load_checkpoint
from .lab.core import ConfigError as ConfigError, FileError as FileError, UnsafeFileError as UnsafeFileError
from .lab.data import load_data as load_data
from .lab.files import save_checkpoint as save_checkpoint
from .lab.generation import generate_pairs as generate_pairs
from .lab.hub import OneStepPipeline as OneStepPipeline
from .lab.imports import import_reference_pairs as import_reference_pairs
from .lab.metrics import compare as compare, load_features as load_features
from .lab.released import load_edm_pickle as load_edm_pickle, load_reference_get as load_reference_get
from .lab.store import PairDataset as PairDataset, save_pairs as save_pairs
from .lab.schedule import TrainConfig as TrainConfig
from .lab.state import TrainingError as TrainingError
from .lab.train import train as train
from .pairs import PairsConfig as PairsConfig, draw_noise as draw_noise
from .presets import with_options as with_options
from .sampler import edm_sigmas as edm_sigmas, euler_sample as euler_sample, heun_sample as heun_sample
from .solvers import anderson as anderson, broyden as broyden, solve as solve

__version__: str
