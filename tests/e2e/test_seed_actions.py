"""A chat reply is four credits, whatever its tokens: through the proxy, and in Chargly's dialect."""

from tests.e2e.conftest import FreshStore, Install
from tests.e2e.transcript import Transcript

WALK_THROUGH = """
POST /v1/billable-metrics
{"key": "chat.reply"}
-> 201

POST /v1/metering-rules
{"billable_metric_key": "chat.reply", "cost_type": "flat", "credit_cost": 4000}
-> 201

POST /v1/topup/grant
{"customer_id": "user_123", "credits": 100000}
-> 200

POST /v1/chat/completions
X-Quota-User: user_123
X-Quota-Action: chat.reply
{"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "Hello!"}]}
-> 200 {"usage": {"cost": "4", "balance": "96"}}

POST /v1/chat/completions
X-Quota-User: user_123
X-Quota-Action: chat.reply
{"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "A much longer question, please: why is that so?"}]}
-> 200 {"usage": {"cost": "4", "balance": "92"}}

POST /chargly/v1/meter
{"event": "chat.reply", "customerId": "user_123"}
-> 200 {"creditsUsed": 4, "balance": 88, "message": "4 credits used"}

GET /chargly/v1/wallet?customerId=user_123
-> 200 {"balance": 88}
"""


def test_the_walk_through(install: Install, fresh_store: FreshStore) -> None:
    farebox = install(**fresh_store())
    app = Transcript(farebox.serve().base_url.removesuffix("/v1"), farebox.live_key)
    # The provider's own cost is the developer's to bear where the action's price is lower; here it is not.
    app.run(WALK_THROUGH)
    app.close()
    farebox.verify()
