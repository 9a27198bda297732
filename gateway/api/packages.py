"""What customers can buy with money: the operator's packages, in the tenant's credits."""

from fastapi import APIRouter
from pydantic import Field

from gateway.api.access import Reader
from gateway.api.services import Here
from gateway.api.wire import Credits, Millicredits, Page, View, amounts
from gateway.payments.packages import Package, price_text
from pricing.money import Asset

router = APIRouter(prefix="/v1", tags=["payments"])

PRICE = "As many decimal places as the currency has."
PRICE_MINOR = "The same in the currency's minor unit: cents."


class PackageView(View):
    id: str = Field(examples=["usd-10"])
    price: str = Field(description=PRICE, examples=["10.00"])
    price_minor: int = Field(description=PRICE_MINOR, examples=[1000])
    currency: str = Field(examples=["usd"])
    credits: Millicredits = Field(description="What the price buys, in millicredits.")
    credits_decimal: Credits
    credits_usd: str = Field(description="What these credits are worth, in dollars.", examples=["10"])
    bonus_credits: Millicredits = Field(description="What comes on top of it, in millicredits.")
    bonus_credits_decimal: Credits
    purchasable: bool = Field(
        description="Whether it can be bought with this key: not where no payments are set up, nor in test mode where "
        "payments are live."
    )


@router.get("/packages")
async def list_packages(principal: Reader, services: Here) -> Page[PackageView]:
    """What customers can buy, the cheapest first of each currency. `POST /v1/checkout` sells one."""
    payments = services.payments
    served = payments is not None and payments.serves(principal.mode)
    views = [package_view(package, principal.asset, served=served) for package in services.packages]
    return Page(data=views, has_more=False, next_cursor=None)


def package_view(package: Package, asset: Asset, *, served: bool) -> PackageView:
    bought = package.in_credits(asset)
    return PackageView(
        id=package.id,
        price=price_text(package.price_minor, package.currency),
        price_minor=package.price_minor,
        currency=package.currency,
        credits_usd=asset.to_usd_text(bought.credited),
        purchasable=served and bought.credited > 0,
        **amounts(asset, credits=bought.credited, bonus_credits=bought.bonus),
    )
