"""The systems that IVON is compared with, each as three or four pure functions.

A system is a function ``system(problem, **setting) -> System``, where a `Problem` is a
network, its likelihood and the length of training, and a setting is hyperparameters
that may be traced: `fit` trains many runs, each with a key and a setting of its own, as
one vmapped program, and `predict` averages their class probabilities over draws.

    runs = fit(ivon, problem, keys, settings, (inputs, targets))
    probs = predict(ivon, problem, runs.state, keys, settings, test_inputs, 64)

All have the same prior, of mean zero and precision `Problem.prior_precision`, which
`with_prior` makes a hyperparameter; only AdamW and AdaHessian have a weight decay that
is none. `trials` are settings to tune with.
"""

from common.baselines.after_training import (
    adamw_posterior as adamw_posterior,
    laplace as laplace,
    sgd_posterior as sgd_posterior,
    swag as swag,
)
from common.baselines.gaussians import (
    at_mean as at_mean,
    bbb as bbb,
    bsam as bsam,
    evon as evon,
    gaussian as gaussian,
    ivon as ivon,
    ivon_optimizer as ivon_optimizer,
    trained_by as trained_by,
    vogn as vogn,
)
from common.baselines.points import (
    adahessian as adahessian,
    adamw as adamw,
    heavy_ball as heavy_ball,
    mc_dropout as mc_dropout,
    muon as muon,
    point as point,
    sgd as sgd,
)
from common.baselines.problem import (
    Problem as Problem,
    System as System,
    mlp as mlp,
    one_by_one as one_by_one,
    stacked as stacked,
    stopped_early as stopped_early,
    trials as trials,
    with_prior as with_prior,
)
from common.baselines.runs import (
    Fitted as Fitted,
    draws as draws,
    fit as fit,
    predict as predict,
    run_functions as run_functions,
)
from common.baselines.subsets import fit_subsets as fit_subsets, with_size as with_size
