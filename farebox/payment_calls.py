"""What can be asked of Farebox about money: packages, and the orders of whoever buys one."""

from farebox.call import PAGE_SIZE, Call, Pages, change, get, listed
from farebox.calls import customer_path, segment
from farebox.payment_values import Checkout, Order, OrderStanding, Package
from farebox.reading import reader


def packages() -> Pages[Package]:
    """What customers can buy, the cheapest of a currency first."""
    return listed("packages", Package)


def create_checkout(
    customer: str,
    package: str,
    *,
    success_url: str | None = None,
    cancel_url: str | None = None,
    save_payment_method: bool = False,
    idempotency_key: str | None = None,
) -> Call[Checkout]:
    """Sell a package: send the customer to the answer's `checkout_url`. The credits come when they have paid.

    Args:
        success_url, cancel_url: where they go then, and without paying; by default to the gateway's own pages.
        save_payment_method: keep how they pay for automatic top-ups, which the page tells them.
    """
    body = {
        "customer_id": customer,
        "package_id": package,
        "success_url": success_url,
        "cancel_url": cancel_url,
        "save_payment_method": save_payment_method or None,
    }
    return change("POST", "checkout", reader(Checkout), body, key=idempotency_key)


def get_order(order_id: str) -> Call[OrderStanding]:
    """An order as it is now, and how much of its price has gone back."""
    return get(f"orders/{segment(order_id)}", OrderStanding)


def orders(customer: str, *, page_size: int = PAGE_SIZE) -> Pages[Order]:
    """A customer's orders, newest first."""
    return listed(f"{customer_path(customer)}/orders", Order, page_size=page_size)
