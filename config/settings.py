"""Every setting, once: flags, `SLIPSTREAM_…` variables and a YAML file share this schema.

Few knobs, and behaviour is good with none set. Each field says its unit, its bound and why one
would change it; `slipstream serve --help` prints exactly these descriptions.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

Fraction = Annotated[float, Field(gt=0, le=1)]


class EngineSettings(BaseModel):
    """What the engine child needs. Sent to it as JSON, so it holds plain values only."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field("", description="local folder or hub id; empty is the built-in model")
    revision: str | None = Field(None, description="hub revision (branch, tag or commit)")
    runner: Literal["auto", "generate", "pooling"] = Field(
        "auto", description="pooling: embeddings of a model made to generate"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="weights and KV; auto: the checkpoint's, if fast here"
    )
    device: Literal["auto", "cpu", "cuda", "xpu"] = Field("auto", description="auto prefers a GPU")
    quantization: Literal["none", "int8", "fp8", "int4"] = Field(
        "none", description="quantize weights at load"
    )
    attention: Literal["auto", "reference", "cpu", "triton"] = Field(
        "auto", description="auto picks the fastest that can serve the model"
    )
    max_model_len: int | None = Field(
        None, ge=16, description="prompt plus output tokens; default: the model's limit"
    )
    max_sequences: int | None = Field(
        None, ge=1, le=4096, description="requests at once; default: 64 on a CPU, 256 on a GPU"
    )
    max_step_tokens: int | None = Field(
        None,
        ge=16,
        le=65536,
        description="tokens in a step; default: 2048 on a CPU, 8192 on a GPU",
    )
    inter_token_target_ms: float = Field(
        100.0, gt=0, description="most time of a step, or 2.5 × its decodes if longer"
    )
    block_size: int = Field(32, ge=1, le=256, description="tokens per KV block")
    kv_cache_dtype: Literal["auto", "fp8"] = Field(
        "auto", description="keys and values; fp8: twice as many fit, less exact"
    )
    kv_cache_gib: float | None = Field(
        None, gt=0, description="KV pool; default: for max_sequences, if it fits"
    )
    num_blocks: int | None = Field(None, ge=2, description="KV pool size in blocks, instead of GiB")
    memory_fraction: Fraction = Field(0.9, description="share of free memory the engine may use")
    prefix_caching: bool = Field(True, description="share KV blocks between equal prompt prefixes")
    policy: Literal["auto", "fcfs", "priority", "deadline", "fair"] = Field(
        "auto", description="who goes first; auto: fair with several keys"
    )
    threads: int | None = Field(None, ge=1, description="CPU threads of the engine; default: cores")
    tensor_parallel: int = Field(
        1, ge=1, le=64, description="devices (on CPU: processes) that share every layer"
    )
    worker: Literal["torch", "simulated"] = Field(
        "torch", description="simulated makes up tokens, to measure the rest"
    )
    trust_remote_code: bool = Field(False, description="run Python code that ships with the model")
    allow_pickle: bool = Field(False, description="load weights that are not safetensors")
    restart_limit: int = Field(
        10, ge=0, description="engine restarts within ten minutes before giving up"
    )
    step_timeout_s: float = Field(
        60.0, gt=0, description="longest step whose time cannot be predicted yet"
    )
    event_log: str | None = Field(None, description="file that records every scheduling decision")
    event_log_mib: float = Field(64.0, ge=1, description="disk that it may take; older is dropped")


class ServerSettings(BaseModel):
    """What the HTTP front end needs."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    host: str = Field("127.0.0.1", description="address to listen on; 0.0.0.0 for all")
    port: int = Field(8000, ge=0, le=65535, description="TCP port")
    served_model_name: str | None = Field(None, description="id in /v1/models; default: the model")
    also: tuple[str, ...] = Field(
        (), description="[NAME=]MODEL of embedders and rerankers to serve beside"
    )
    api_keys: tuple[str, ...] = Field((), description="when set, requests need one as bearer token")
    api_key_file: str = Field("", description="YAML of hashed keys and quotas, reread when changed")
    admin_key: str = Field("", description="when set, /metrics and /debug need it")
    cors_origins: tuple[str, ...] = Field((), description="web pages that may call; * for all")
    tls_cert: str = Field("", description="PEM file of the certificate chain: serve HTTPS")
    tls_key: str = Field("", description="PEM file of its key, if not in the same file")
    tls_client_ca: str = Field("", description="PEM file; clients need a certificate by it")
    max_queued_requests: int = Field(1024, ge=1, description="beyond this, 429")
    max_queued_tokens: int = Field(4_194_304, ge=1, description="beyond this, 429")
    max_body_bytes: int = Field(16_777_216, ge=1024, description="larger bodies get 413")
    max_grammar_bytes: int = Field(131_072, ge=256, description="larger schemas and such get 400")
    response_store: str = Field("", description="SQLite file of responses; empty: in memory")
    max_stored_responses: int = Field(4096, ge=1, description="beyond this the oldest is dropped")
    drain_seconds: float = Field(30.0, ge=0, description="grace for open streams on SIGTERM")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="logs")
    log_format: Literal["text", "json"] = Field("text", description="one line or object each")
    otlp_endpoint: str = Field(
        "", pattern="^(https?://.+)?$", description="URL to send traces to; needs slipstream[otel]"
    )

    @field_validator("tls_key", "tls_client_ca")
    @classmethod
    def _only_with_a_certificate(cls, value: str, info: ValidationInfo) -> str:
        if value and not info.data.get("tls_cert"):
            raise ValueError("only with tls_cert")
        return value
