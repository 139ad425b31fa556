"""The assistant. Importing this package registers it with transformers' Auto classes."""

from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from llava_drip.assistant.build import build_assistant, load_assistant
from llava_drip.assistant.configuration import LlavaDripConfig
from llava_drip.assistant.modeling import LlavaDripForConditionalGeneration
from llava_drip.assistant.processing import IMAGE_TOKEN, LlavaDripProcessor

AutoConfig.register(LlavaDripConfig.model_type, LlavaDripConfig)
AutoModelForImageTextToText.register(LlavaDripConfig, LlavaDripForConditionalGeneration)
AutoProcessor.register(LlavaDripConfig, LlavaDripProcessor)

__all__ = [
    "IMAGE_TOKEN",
    "LlavaDripConfig",
    "LlavaDripForConditionalGeneration",
    "LlavaDripProcessor",
    "build_assistant",
    "load_assistant",
]
