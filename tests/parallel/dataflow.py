"""Which operations of a traced function wait for which others."""

from jax import make_jaxpr
from jax.extend import core

CALLS = {
    "jit",
    "pjit",
    "closed_call",
    "custom_vjp_call",
    "custom_jvp_call",
    "shard_map",
    "remat2",
    "checkpoint",
}


def waiting(function, *args, source, sink):
    """Whether an input of a `sink` comes from a `source`, however far back, for each sink in order.

    Both are names of primitives. Calls are looked into. A branch counts as one operation, which is
    what it holds. One step of a loop is looked at by itself.
    """
    found = []

    def visit(jaxpr, tainted):
        late = dict(zip(jaxpr.invars, tainted, strict=True))
        for eqn in jaxpr.eqns:
            inputs = [
                late.get(var, False) if not isinstance(var, core.Literal) else False
                for var in eqn.invars
            ]
            inner = list(core.jaxprs_in_params(eqn.params))
            if (
                eqn.primitive.name in CALLS
                and len(inner)
                and len(inner[0].invars) == len(eqn.invars)
            ):
                outputs = visit(inner[0], inputs)
            elif eqn.primitive.name == "scan":
                visit(inner[0], [False] * len(inner[0].invars))
                outputs = [any(inputs) or source in names_in(eqn)] * len(eqn.outvars)
            else:
                names = names_in(eqn)
                if sink in names:
                    found.append(any(inputs))
                outputs = [any(inputs) or source in names] * len(eqn.outvars)
            late.update(zip(eqn.outvars, outputs, strict=True))
        return [
            late.get(var, False) if not isinstance(var, core.Literal) else False
            for var in jaxpr.outvars
        ]

    jaxpr = make_jaxpr(function)(*args).jaxpr
    visit(jaxpr, [False] * len(jaxpr.invars))
    return found


def names_in(eqn):
    names = {eqn.primitive.name}
    for jaxpr in core.jaxprs_in_params(eqn.params):
        for inner in jaxpr.eqns:
            names |= names_in(inner)
    return names
