"""Full fine-tuning, the baseline: it trains the backbone itself, and is saved, loaded and detached like any delta."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from deltaexp.addressing import covers
from deltaexp.errors import AddressingError
from deltaexp.registry import DeltaConfig, register

if TYPE_CHECKING:
    from deltaexp.targets import Site


@register
@dataclass
class FullConfig(DeltaConfig):
    """Full fine-tuning trains every parameter of the backbone, or of the modules in ``modified_modules``, in place."""

    delta_type: str = "full"
    exclude_modules: list[str] = field(default_factory=list)
    """Patterns of modules that are not trained, together with everything below them; none as a rule."""

    learning_rate: ClassVar[float] = 5e-5
    """Devlin et al., 2019, appendix A.3, choose among 5e-5, 3e-5 and 2e-5 for BERT on GLUE, with AdamW. This is the
    largest; for larger backbones smaller ones are used."""

    def defaults(self) -> tuple[str, ...]:
        """Return the blocks, where ``layers`` chooses some of them; else the whole backbone is meant."""
        return () if self.layers is None else ("block",)

    def owned(self, site: Site) -> list[str]:
        """Return the names of the module's parameters that no excluded module holds, under this or another name.

        Raises:
            AddressingError: If none is left.
        """
        from deltaexp.structure import backbone_parameters

        parameters = backbone_parameters(site.module)
        excluded = self._excluded(site)
        names = [name for name, parameter in parameters.items() if id(parameter) not in excluded]
        if not names:
            rest = f"exclude_modules {self.exclude_modules!r} leaves none of them" if parameters else "it has none"
            where = repr(site.name) if site.name else "the backbone"
            raise AddressingError(f"The delta type 'full' trains the parameters of {where}, and {rest}. Change one of the two.")
        return names

    def _excluded(self, site: Site) -> set[int]:
        """Return the identities of the parameters in excluded modules."""
        from deltaexp.structure import backbone_modules, common_names

        if not self.exclude_modules:
            return set()
        assert site.backbone is not None
        if "excluded" not in site.shared:  # the same for all places
            common = common_names(site.backbone)
            site.shared["excluded"] = {
                id(parameter)
                for name, module in backbone_modules(site.backbone)
                if any(covers(entry, name, common.get(name, ())) for entry in self.exclude_modules)
                for parameter in module.parameters()
            }
        return site.shared["excluded"]
