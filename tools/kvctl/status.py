"""`kvctl status`: the instances, and what became of the requests."""

from __future__ import annotations

import click

from snowskin.tools.kvctl.admin import AdminClient, ClusterStatus
from snowskin.tools.kvctl.output import (
    KvctlSettings,
    age_text,
    ask,
    nbytes_text,
    print_json,
    print_table,
    rate_text,
    table,
    with_settings,
)


@click.command()
@with_settings
def status(settings: KvctlSettings) -> None:
    """Instances with their load, counts of requests, and what is known of the nodes.

    A `suspect` instance has missed its reports or failed a call, and gets no new requests. Requests are placed by the
    blocks known of nodes that are `in sync`; one that is `syncing`, `suspect` or `unknown` is asked each time.
    `kvctl nodes` asks the nodes themselves.
    """
    answer = ask(settings, AdminClient.cluster_status)
    if settings.json:
        print_json(answer)
    else:
        _print(answer)


def _print(answer: ClusterStatus) -> None:
    instances = table(
        "instance", "role", "state", "#running", "#waiting", "#waiting tokens", "#KV blocks free",
        "#prefill", "#pull", "#decode step", "#last report", "node", "address",
        title=f"model {answer.model_name}",
    )  # fmt: skip
    for instance in answer.instances:
        step = f"{1000 * instance.decode_step_s:.1f} ms" if instance.decode_step_s > 0 else "-"
        pull = instance.pull_bytes_per_s
        instances.add_row(
            instance.instance_id,
            instance.role,
            instance.state,
            str(instance.num_running),
            str(instance.num_waiting),
            f"{instance.num_waiting_tokens:,}",
            f"{instance.num_kv_blocks_free:,} of {instance.num_kv_blocks:,}",
            rate_text(instance.prefill_tokens_per_s, "tokens/s"),
            f"{nbytes_text(pull)}/s" if pull > 0 else "-",
            step,
            f"{instance.seconds_since_report:.1f} s ago",
            instance.node_address,
            instance.address,
        )
    requests = table("#running", "#finished", "#refused", "#failed", title="requests")
    requests.add_row(
        str(answer.num_requests_running),
        str(answer.num_requests_finished),
        str(answer.num_requests_refused),
        str(answer.num_requests_failed),
    )
    known = table("node", "directory", "#blocks known", "#last heard", "#astray", title="nodes")
    for node in answer.nodes:
        known.add_row(
            node.address,
            node.state,
            f"{node.num_blocks:,}",
            age_text(node.seconds_since_message),
            str(node.num_astray),
        )
    print_table(instances, requests, *([known] if answer.nodes else []))
