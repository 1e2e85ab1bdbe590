"""What a run says of the papers' pieces that it has."""

from experiments import configs
from experiments.command import configuration_lines
from ultra_hstu.fields import changed
from ultra_hstu.pieces import pieces


def test_everything_has_every_piece():
    everything = configs.named("everything")
    assert pieces(everything) == [
        "stochastic length 1.8",
        "balanced load",
        "merged input",
        "window 128",
        "32 full rows",
        "256 events after 2 layers",
        "mixture of 2",
        "projections in fp8",
        "selective rematerialisation",
        "mini-sequences of 1024 rows",
        "4 devices share rows",
        "tables divided",
        "tables by rowwise_adagrad",
        "matrices divided",
    ]
    assert configuration_lines(everything)[-1].startswith("pieces: stochastic length 1.8, balanced")


def test_a_layer_may_have_a_window_of_its_own():
    config = changed(configs.named("ml1m_hstu"), model={"window": (-1, 8), "prefix": (2,)})
    assert pieces(config) == ["window -1/8", "prefix 2"]
    assert not pieces(configs.named("ml1m_hstu"))
