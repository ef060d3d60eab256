/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
 *
 * On the node side of every workload's veth: a workload sends from its own addresses or not at all.
 */
#pragma once

#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/pkt_cls.h>

#include "address.h"
#include "maps.h"

/* RFC 826, for Ethernet and IPv4. */
struct arp_ipv4 {
	__u16 hardware_type, protocol_type;
	__u8 hardware_length, protocol_length;
	__u16 operation;
	__u8 sender_mac[ETH_ALEN];
	__u32 sender_ip;
	__u8 target_mac[ETH_ALEN];
	__u32 target_ip;
} __attribute__((packed));

static __always_inline int mac_equal(const __u8 *a, const __u8 *b)
{
	return a[0] == b[0] && a[1] == b[1] && a[2] == b[2] && a[3] == b[3] && a[4] == b[4] &&
	       a[5] == b[5];
}

static __always_inline int own_v4(struct __sk_buff *skb, const struct device_entry *device)
{
	__u32 source;

	if (bpf_skb_load_bytes(skb, ETH_HLEN + __builtin_offsetof(struct iphdr, saddr), &source,
			       sizeof(source)))
		return 0;
	return source == device->v4.word[3];
}

static __always_inline int own_v6(struct __sk_buff *skb, const struct device_entry *device)
{
	struct ipv6hdr header;
	struct address source;

	if (bpf_skb_load_bytes(skb, ETH_HLEN, &header, sizeof(header)))
		return 0;
	__builtin_memcpy(&source, &header.saddr, sizeof(source));
	if (address_equal(&source, &device->v6))
		return 1;
	/* Neighbour discovery and multicast listener reports come from link-local or no address;
	 * the latter behind a hop-by-hop header. */
	if (header.nexthdr != IPPROTO_ICMPV6 && header.nexthdr != IPPROTO_HOPOPTS)
		return 0;
	return (source.word[0] & bpf_htonl(0xffc00000)) == bpf_htonl(0xfe800000) ||
	       (source.word[0] | source.word[1] | source.word[2] | source.word[3]) == 0;
}

static __always_inline int own_arp(struct __sk_buff *skb, const struct device_entry *device)
{
	struct arp_ipv4 arp;

	if (bpf_skb_load_bytes(skb, ETH_HLEN, &arp, sizeof(arp)))
		return 0;
	return mac_equal(arp.sender_mac, device->mac) &&
	       arp.sender_ip == device->v4.word[3];
}

SEC("classifier")
int heddle_spoof(struct __sk_buff *skb)
{
	__u32 index = skb->ifindex;
	struct device_entry *device = bpf_map_lookup_elem(&devices, &index);
	struct ethhdr ethernet;
	int own = 0;

	if (!device) {
		count(REASON_DEVICE_UNKNOWN);
		return TC_ACT_SHOT;
	}
	if (bpf_skb_load_bytes(skb, 0, &ethernet, sizeof(ethernet)))
		return TC_ACT_SHOT;
	if (mac_equal(ethernet.h_source, device->mac)) {
		if (ethernet.h_proto == bpf_htons(ETH_P_IP))
			own = own_v4(skb, device);
		else if (ethernet.h_proto == bpf_htons(ETH_P_IPV6))
			own = own_v6(skb, device);
		else if (ethernet.h_proto == bpf_htons(ETH_P_ARP))
			own = own_arp(skb, device);
	}
	if (own)
		return TC_ACT_UNSPEC;
	count(REASON_SPOOFED);
	return TC_ACT_SHOT;
}
