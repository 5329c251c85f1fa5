"""What methods share that may divide their budget among groups: the settings that say how."""

from dataclasses import dataclass

from curate.selectors.group_budgets import GroupBudgets, MinShares, Shares, check_shares


@dataclass(frozen=True, kw_only=True)
class ByGroup:
    """Settings of a method whose rows are of groups: a column, and what each group gets.

    Raises:
        ValueError: shares that cannot be, or without a column of groups.
    """

    by_group: str | None = None
    group_shares: Shares | None = None
    min_shares: MinShares | None = None

    def __post_init__(self) -> None:
        check_shares("group_shares", self.group_shares, self.min_shares)
        if self.by_group is None and not (self.group_shares is None and self.min_shares is None):
            raise ValueError("group_shares and min_shares need a column of groups, by_group=COLUMN")

    @property
    def needs(self) -> frozenset[str]:
        named = (getattr(self, "by", None), self.by_group)
        return frozenset(name for name in named if name is not None)

    @property
    def budgets(self) -> GroupBudgets | None:
        """A fresh division of budgets among the groups, None where there are none."""
        if self.by_group is None:
            return None
        return GroupBudgets(self.by_group, self.group_shares or "proportional", self.min_shares)
