"""The models that a key can ask for, in OpenAI's form."""

from typing import Annotated, Literal

from fastapi import APIRouter, Path

from gateway.api.access import Proxier
from gateway.api.services import Here
from gateway.api.wire import View
from gateway.errors import model_not_found

router = APIRouter(prefix="/v1", tags=["proxy"])

MICROSECONDS = 1_000_000


class ModelView(View):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str


class ModelList(View):
    object: Literal["list"] = "list"
    data: list[ModelView]


@router.get("/models")
async def list_models(principal: Proxier, services: Here) -> ModelList:
    """Every model that is served and priced."""
    return ModelList(data=await _models(services))


@router.get("/models/{model:path}")
async def get_model(
    model: Annotated[str, Path(min_length=1, max_length=256)], principal: Proxier, services: Here
) -> ModelView:
    """One model."""
    for known in await _models(services):
        if known.id == model:
            return known
    raise model_not_found(model)


async def _models(services: Here) -> list[ModelView]:
    return [
        ModelView(id=name, created=card.effective_from_us // MICROSECONDS, owned_by=card.provider)
        for name, card in (await services.models.all()).items()
    ]
