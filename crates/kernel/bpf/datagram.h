/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
 *
 * Datagrams, which have no connection to keep state in. Whom an unconnected socket has asked is kept in the socket
 * (`peers`): an answer is let in and shown under the address that was asked. What went to and fro is counted in
 * `datagrams`, for flow records only: nothing is decided by it, and without room in it nothing is refused.
 */
#pragma once

#include <linux/in.h>

#include "address.h"
#include "flow.h"
#include "maps.h"

/* How long after the last datagram either way an answer is still one. The kernel's connection tracking waits as
 * long for replies to a datagram (nf_conntrack_udp_timeout_stream is 120 s, nf_conntrack_udp_timeout 30 s). */
#define PEER_IDLE_NS (60ULL * 1000000000ULL)
/* Refusals of one socket are recorded this often at most (in units of 2^20 ns); all are counted. */
#define REFUSAL_INTERVAL 100

static __always_inline __u32 peer_set(const struct address *address, __u16 port)
{
	__u32 hash = address->word[0] ^ address->word[1] ^ address->word[2];

	/* Multiplying by odd constants and folding spreads neighbouring addresses and ports. */
	hash = (hash ^ address->word[3]) * 0x9e3779b1 + port * 0x85ebca6b;
	hash ^= hash >> 15;
	return (hash * 0xc2b2ae35 >> 16) & (PEER_SETS - 1);
}

/* The entry of a peer that was asked lately, or null. */
static __always_inline struct peer *find_peer(struct bpf_sock *socket, const struct address *address,
					      __u16 port, __u64 now)
{
	struct peers *table = bpf_sk_storage_get(&peers, socket, 0, 0);
	__u32 first;

	if (!table)
		return 0;
	first = peer_set(address, port) * PEER_WAYS;
#pragma unroll
	for (__u32 way = 0; way < PEER_WAYS; way++) {
		struct peer *peer = &table->peer[(first + way) & (PEER_SETS * PEER_WAYS - 1)];

		if (peer->port == port && peer->last_ns && now - peer->last_ns < PEER_IDLE_NS &&
		    address_equal(&peer->address, address))
			return peer;
	}
	return 0;
}

/* Remembers whom a socket asks. Fails, and with it the datagram, if there is no room for somebody new. */
static __always_inline int note_peer(struct bpf_sock *socket, const struct decision *d,
				     const struct grant *grant)
{
	struct peers *table = bpf_sk_storage_get(&peers, socket, 0, BPF_SK_STORAGE_GET_F_CREATE);
	__u64 now = bpf_ktime_get_ns();
	struct peer *place = 0;
	__u32 first;

	if (!table)
		return 0;
	first = peer_set(&d->destination, d->port) * PEER_WAYS;
#pragma unroll
	for (__u32 way = 0; way < PEER_WAYS; way++) {
		struct peer *peer = &table->peer[(first + way) & (PEER_SETS * PEER_WAYS - 1)];

		if (peer->port == d->port && address_equal(&peer->address, &d->destination)) {
			place = peer;
			break;
		}
		if (!place && (!peer->last_ns || now - peer->last_ns >= PEER_IDLE_NS))
			place = peer;
	}
	if (!place)
		return 0;
	place->last_ns = 0; /* not to be found half-written */
	asm volatile("" ::: "memory");
	place->address = d->destination;
	place->port = d->port;
	place->original = grant->original;
	place->original_port = grant->original_port;
	asm volatile("" ::: "memory");
	place->last_ns = now;
	return 1;
}

static __always_inline int record_refusal(struct socket_state *state)
{
	__u32 now = bpf_ktime_get_ns() >> 20;

	if (now - state->refused_at < REFUSAL_INTERVAL)
		return 0;
	state->refused_at = now;
	return 1;
}

static __always_inline void report_first(const struct tuple *t, const struct grant *grant,
					 __u64 start_ns)
{
	struct flow_event *event = flow_begin(FLOW_OPENED, grant);

	if (!event)
		return;
	event->cookie = start_ns; /* tells it from all others of the node */
	event->source = t->source;
	event->destination = t->destination;
	event->source_port = t->source_port;
	event->destination_port = t->destination_port;
	event->protocol = IPPROTO_UDP;
	event->socket_class = CLASS_APP;
	event->flags = SOCKET_ESTABLISHED;
	flow_submit(event);
}

/* The record of a client and a server, begun if there is none. Null if there is no room: then it is lost. */
static __always_inline struct datagram_flow *datagram_flow(const struct tuple *t,
							   const struct grant *grant)
{
	struct datagram_flow *flow = bpf_map_lookup_elem(&datagrams, t);
	struct datagram_flow fresh = {};

	if (flow)
		return flow;
	fresh.start_ns = bpf_ktime_get_ns();
	fresh.last_ns = fresh.start_ns;
	fresh.original = grant->original;
	fresh.original_port = grant->original_port;
	fresh.source_workload = grant->source_workload;
	fresh.source = grant->source;
	fresh.destination_workload = grant->destination_workload;
	fresh.policy = grant->policy;
	fresh.service = grant->service;
	fresh.reason = grant->reason;
	if (bpf_map_update_elem(&datagrams, t, &fresh, BPF_NOEXIST)) {
		flow = bpf_map_lookup_elem(&datagrams, t);
		if (!flow)
			count(REASON_EVENT_LOST);
		return flow;
	}
	report_first(t, grant, fresh.start_ns);
	return bpf_map_lookup_elem(&datagrams, t);
}

static __always_inline void count_request(struct datagram_flow *flow, __u32 bytes)
{
	if (!flow)
		return;
	flow->last_ns = bpf_ktime_get_ns();
	__sync_fetch_and_add(&flow->bytes_sent, bytes);
	__sync_fetch_and_add(&flow->packets_sent, 1);
}

/* Counts what came back to a client, where the two have a record. */
static __always_inline int count_answer(const struct tuple *back, const struct grant *grant,
					__u32 bytes)
{
	struct tuple t = { .source = back->destination,
			   .destination = back->source,
			   .source_port = back->destination_port,
			   .destination_port = back->source_port };
	struct datagram_flow *flow = bpf_map_lookup_elem(&datagrams, &t);

	if (!flow)
		return 0;
	flow->last_ns = bpf_ktime_get_ns();
	__sync_fetch_and_add(&flow->bytes_received, bytes);
	__sync_fetch_and_add(&flow->packets_received, 1);
	/* The record of a connected socket is begun by its server, which does not know what was asked for. */
	if (grant && !flow->service && grant->service) {
		flow->original = grant->original;
		flow->original_port = grant->original_port;
		flow->service = grant->service;
	}
	return 1;
}
