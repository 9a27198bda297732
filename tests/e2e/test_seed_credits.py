"""A credit system to the digit, in Autumn's dialect: 2000 tokens at 0.1 and 60 at 5 use up 500 credits."""

import pytest

from tests.e2e.conftest import FreshStore, Install
from tests.e2e.transcript import Transcript

SET_UP = """
POST /v1/billable-metrics
{"key": "<feature>"}
-> 201

POST /v1/metering-rules
{"billable_metric_key": "<feature>", "cost_type": "per_unit", "unit_cost": <price>}
-> 201
"""

FREE = """
PATCH /v1/tenants/me/config
{"default_grant": {"credits": 500000}}
-> 200
"""

WALK_THROUGH = """
POST /autumn/v1/entitled
{"customer_id": "user_123", "feature_id": "small-model-tokens"}
-> 200 {"allowed": true, "balances": [{"required": 0.1, "balance": 500, "unlimited": false, "usage_allowed": false}]}

POST /autumn/v1/events
{"customer_id": "user_123", "event_name": "small-model-tokens", "value": 2000}
-> 200 {"credits_used": 200, "balance": 300}

POST /autumn/v1/events
{"customer_id": "user_123", "event_name": "large-model-tokens", "value": 60}
-> 200 {"credits_used": 300, "balance": 0}

POST /autumn/v1/entitled
{"customer_id": "user_123", "feature_id": "large-model-tokens"}
-> 200 {"allowed": false, "balances": [{"required": 5, "balance": 0}]}

POST /autumn/v1/check
{"customer_id": "user_123", "feature_id": "small-model-tokens"}
-> 200 {"allowed": false, "balance": 0}

POST /autumn/v1/track
{"customer_id": "user_123", "feature_id": "small-model-tokens", "value": 1}
-> 402 {"code": "insufficient_credits", "error": {"code": "insufficient_credits", "needed_decimal": "0.1"}}
"""

OVERAGE = """
PATCH /v1/billable-metrics/<feature>
{"overage_policy": "allow"}
-> 200
"""

PRO = """
POST /v1/topup/grant
{"customer_id": "user_pro", "credits": 9500000}
-> 200 {"balance": 10000000}

POST /autumn/v1/track
{"customer_id": "user_pro", "feature_id": "small-model-tokens", "value": 50000}
-> 200 {"credits_used": 5000, "balance": 5000}

POST /autumn/v1/track
{"customer_id": "user_pro", "feature_id": "medium-model-tokens", "value": 10000}
-> 200 {"credits_used": 10000, "balance": -5000}

POST /autumn/v1/track
{"customer_id": "user_pro", "feature_id": "large-model-tokens", "value": 1000}
-> 200 {"credits_used": 5000, "balance": -10000}

POST /autumn/v1/entitled
{"customer_id": "user_pro", "feature_id": "small-model-tokens"}
-> 200 {"allowed": true, "balances": [{"balance": -10000, "usage_allowed": true}]}
"""

PRICES = {"small-model-tokens": "100", "medium-model-tokens": "1000", "large-model-tokens": "5000"}


@pytest.mark.parametrize("overage", [False, True], ids=["free", "with overage"])
def test_the_walk_through(install: Install, fresh_store: FreshStore, overage: bool) -> None:
    farebox = install(**fresh_store())
    base_url = farebox.serve().base_url.removesuffix("/v1")
    admin = Transcript(base_url, farebox.admin_key)
    app = Transcript(base_url, farebox.live_key)
    admin.run(FREE)
    for feature, price in PRICES.items():
        app.run(SET_UP, feature=feature, price=price)
        if overage:
            app.run(OVERAGE)
    app.run(PRO if overage else WALK_THROUGH)
    for transcript in (admin, app):
        transcript.close()
    farebox.verify()
