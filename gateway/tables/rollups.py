"""Usage added up: a row says what the charges of one hour or day, and of one combination of names, come to.

How it works. Every sum that could outgrow 64 bits stands in two columns: its upper part (shifted right by 31)
and its lower part (the last 31 bits) are summed apart, so that four thousand million of the largest amounts still fit.
The amount is ``high * 2**31 + low``. A name that a charge does not have is an empty text, because null is no key.
"""

from sqlalchemy import BigInteger, Text
from sqlmodel import Field, SQLModel


class Sums(SQLModel):
    """What charges come to. Amounts are in the asset's smallest unit, cost in nano-dollars, units in millionths."""

    events: int = Field(sa_type=BigInteger)
    charged_high: int = Field(sa_type=BigInteger)
    charged_low: int = Field(sa_type=BigInteger)
    markup_high: int = Field(sa_type=BigInteger)
    markup_low: int = Field(sa_type=BigInteger)
    provider_cost_high: int = Field(sa_type=BigInteger)
    provider_cost_low: int = Field(sa_type=BigInteger)
    microunits_high: int = Field(sa_type=BigInteger)
    microunits_low: int = Field(sa_type=BigInteger)
    input_tokens: int = Field(sa_type=BigInteger)
    output_tokens: int = Field(sa_type=BigInteger)


class UsageRollup(Sums, table=True):
    """All charges of one hour or of one day (`grain`), in UTC."""

    __tablename__ = "usage_rollups"
    __table_args__ = ({"sqlite_with_rowid": False},)

    tenant: str = Field(primary_key=True, sa_type=Text)
    mode: str = Field(primary_key=True, sa_type=Text)
    grain: str = Field(primary_key=True, sa_type=Text)
    starts_at_us: int = Field(primary_key=True, sa_type=BigInteger, sa_column_kwargs={"autoincrement": False})
    metric: str = Field(primary_key=True, sa_type=Text)
    model: str = Field(primary_key=True, sa_type=Text)
    action: str = Field(primary_key=True, sa_type=Text)
    app: str = Field(primary_key=True, sa_type=Text)


class UsageByCustomer(Sums, table=True):
    """A customer's charges of one day. The customer comes first: a page of customers is one range of the key."""

    __tablename__ = "usage_by_customer"
    __table_args__ = ({"sqlite_with_rowid": False},)

    tenant: str = Field(primary_key=True, sa_type=Text)
    mode: str = Field(primary_key=True, sa_type=Text)
    customer: str = Field(primary_key=True, sa_type=Text)
    starts_at_us: int = Field(primary_key=True, sa_type=BigInteger, sa_column_kwargs={"autoincrement": False})
    metric: str = Field(primary_key=True, sa_type=Text)
    model: str = Field(primary_key=True, sa_type=Text)
    action: str = Field(primary_key=True, sa_type=Text)
    app: str = Field(primary_key=True, sa_type=Text)


class UsageByMetadata(Sums, table=True):
    """The charges of one day that have this value under this key of their metadata."""

    __tablename__ = "usage_by_metadata"
    __table_args__ = ({"sqlite_with_rowid": False},)

    tenant: str = Field(primary_key=True, sa_type=Text)
    mode: str = Field(primary_key=True, sa_type=Text)
    key: str = Field(primary_key=True, sa_type=Text)
    value: str = Field(primary_key=True, sa_type=Text)
    starts_at_us: int = Field(primary_key=True, sa_type=BigInteger, sa_column_kwargs={"autoincrement": False})
    metric: str = Field(primary_key=True, sa_type=Text)
    model: str = Field(primary_key=True, sa_type=Text)
    action: str = Field(primary_key=True, sa_type=Text)
    app: str = Field(primary_key=True, sa_type=Text)
