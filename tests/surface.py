"""The public names as a user's program calls them. Never run: `make types` reads it, with the types that editors show."""

import torch

import get_nb

noise, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3])
model = get_nb.create_model("GET-B/2", num_classes=10)
images = model(noise, labels=labels)
teacher = get_nb.create_teacher("edm-cifar10-32x32-cond-vp").eval()
slow = get_nb.heun_sample(teacher, noise, labels, num_steps=18)
fast = get_nb.euler_sample(teacher, noise, labels, num_steps=18)
sigmas = get_nb.edm_sigmas(18)


def f(z: torch.Tensor) -> torch.Tensor:
    return z.cos()


z0 = torch.zeros(2, 3)
z_star, stats = get_nb.solve(f, z0, solver="anderson", max_iter=20, tol=1e-6)
z_star, stats = get_nb.anderson(f, z0, max_iter=20, window=5)
z_star, stats = get_nb.broyden(f, z0, max_iter=20, window=5)
z_star, stats = get_nb.fixed_point_iter(f, z0, max_iter=20)
z_star, stats = get_nb.equilibrium(f, z0, gradient="implicit", solver="anderson", max_iter=20)
penalty, radius = get_nb.jacobian_penalty(f, z0), get_nb.spectral_radius(f, z0)
states = [get_nb.unroll(f, z0, n_iter=6)[-1], get_nb.unroll_constant(f, z0, n_iter=6)[-1]]

data = get_nb.load_data("digits", "train")
pairs = get_nb.PairDataset("pairs")
result = get_nb.distill(model, pairs, get_nb.DistillConfig(), get_nb.TrainConfig(steps=10))
config = get_nb.EvalConfig(samples=100)
recipe = get_nb.PairsConfig(n=10, shape=(3, 32, 32), teacher="mine")
noise, labels = get_nb.draw_noise(range(4), (3, 32, 32), 10)
names = get_nb.list_models()
others = [
    get_nb.generate_pairs,
    get_nb.save_pairs,
    get_nb.import_reference_pairs,
    get_nb.train,
    get_nb.evaluate,
    get_nb.compare,
    get_nb.load_features,
    get_nb.with_options,
]

get_nb.save_checkpoint("model.safetensors", model)
again = get_nb.load_checkpoint("model.safetensors")
released = [get_nb.load_reference_get("GET-B.pth"), get_nb.load_edm_pickle("edm.pkl")]
pipeline = get_nb.OneStepPipeline.from_pretrained("digits-get")
errors: tuple[type[Exception], ...] = (
    get_nb.ConfigError,
    get_nb.FileError,
    get_nb.UnsafeFileError,
    get_nb.TrainingError,
)
version: str = get_nb.__version__
