"""systemd_worker.py move|hold SENDER [RECEIVER]: workers for check/systemd-guest.sh.

move: hands a block over between the daemons at the two sockets, and compares it.
hold: opens a transfer that nobody takes, says "held", and tells how it ended; for a daemon that drains.
"""
import sys

import kvferry as kv


def attach(socket, instance):
    client = kv.Client(socket, name=instance)
    pages = client.alloc_array("kv", (16, 2, 2, 4, 8, 32), "float16")
    layout = client.layout_from_tensors(pages, layers=[0, 1], kv_packing=kv.KvPacking.SEPARATE, axes="blkhnd",
                                        fingerprint="m@1", tokens_per_block=8, heads=4)
    return client, pages, client.register_layout(instance, layout).ref


def main():
    sender, source, source_layout = attach(sys.argv[2], "prefill")
    source[[3, 5]] = 1.5
    key = kv.TransferKey("request", kv.random_secret(), instance="prefill")
    ticket = sender.ticket("prefill")
    sent = sender.send(key, source_layout, kv.GroupBlocks([3, 5]), num_tokens=13)
    if sys.argv[1] == "hold":
        print("held", flush=True)
        print(sent.wait(120), flush=True)
        return
    receiver, target, target_layout = attach(sys.argv[3], "decode")
    receiver.receive_wait(key, target_layout, ticket, kv.GroupBlocks([8, 0]), num_tokens=13, timeout=60)
    assert (target[[8, 0]] == source[[3, 5]]).all()
    sent.wait(60).check()
    print("moved and compared")


main()
