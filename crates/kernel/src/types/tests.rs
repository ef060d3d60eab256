//! Both declarations must agree: clang checks what rustc computed.

use std::{fmt::Write as _, mem::offset_of, process::Command};

use super::*;

#[test]
fn addresses_survive_the_round_trip() {
    for text in ["10.244.0.7", "fd10:244::7", "0.0.0.0", "::1"] {
        let address: IpAddr = text.parse().unwrap();
        assert_eq!(IpAddr::from(Address::from(address)), address);
    }
}

#[test]
fn a_syn_and_a_fin_are_no_payload() {
    let state = |flags| SocketState {
        flags,
        ..SocketState::default()
    };
    let client = state(SocketState::CLIENT);
    assert_eq!(client.payload(11, 20), (10, 20));
    let closed = state(client.flags | SocketState::FIN_ACKED | SocketState::FIN_RECEIVED);
    assert_eq!(closed.payload(12, 21), (10, 20));
    assert_eq!(state(0).payload(11, 20), (11, 20));
    assert_eq!(closed.payload(0, 0), (0, 0));
    assert_eq!(SocketState::from_bytes(&[0; 3]), None);
}

#[test]
fn a_deliverys_mark_says_for_which_workload_and_is_no_datagrams() {
    assert_eq!(crate::delivery_mark(0), None);
    assert_eq!(crate::delivery_mark(1), Some(0xc000_0001));
    let last = !crate::DELIVERY_MASK;
    assert_eq!(crate::delivery_mark(last), Some(u32::MAX));
    assert_eq!(crate::delivery_mark(last + 1), None);
    assert_ne!(
        SocketState::MARK_REPLIES & crate::DELIVERY_MASK,
        crate::DELIVERY_MARK
    );
}

/// Both declarations must agree: clang checks every size and offset that rustc computed.
#[test]
fn layout_is_that_of_the_c_header() {
    let mut source = String::from("#include \"types.h\"\n");
    macro_rules! check {
        ($c:literal, $rust:ident { $($field:ident),* }) => {
            writeln!(source, "_Static_assert(sizeof(struct {}) == {}, \"size of {0}\");", $c, size_of::<$rust>()).unwrap();
            $(writeln!(source, "_Static_assert(__builtin_offsetof(struct {}, {}) == {}, \"offset of {0}.{1}\");",
                $c, stringify!($field), offset_of!($rust, $field)).unwrap();)*
        };
    }
    check!(
        "cgroup_entry",
        CgroupEntry {
            workload,
            socket_class
        }
    );
    check!(
        "workload_entry",
        WorkloadEntry {
            netns,
            source,
            policy_set,
            v4,
            v6,
            flags,
            padding
        }
    );
    check!(
        "address_entry",
        AddressEntry {
            workload,
            flags,
            policy_set
        }
    );
    check!(
        "service_key",
        ServiceKey {
            address,
            port,
            protocol,
            padding
        }
    );
    check!(
        "service_entry",
        ServiceEntry {
            service,
            generation,
            slots,
            affinity_seconds
        }
    );
    check!(
        "slot_key",
        SlotKey {
            service,
            generation,
            slot
        }
    );
    check!(
        "slot_entry",
        SlotEntry {
            endpoint,
            alias,
            threshold
        }
    );
    check!(
        "endpoint_entry",
        EndpointEntry {
            address,
            service,
            port,
            padding
        }
    );
    check!(
        "verdict_key",
        VerdictKey {
            source,
            policy_set,
            port,
            socket_class,
            padding
        }
    );
    check!(
        "verdict_entry",
        VerdictEntry {
            policy,
            reason,
            action,
            padding
        }
    );
    check!("capture_key", CaptureKey { workload, kind });
    check!(
        "device_entry",
        DeviceEntry {
            v4,
            v6,
            mac,
            padding
        }
    );
    check!(
        "tuple",
        Tuple {
            source,
            destination,
            source_port,
            destination_port
        }
    );
    // "source" is the C name of the identity's number.
    writeln!(
        source,
        "_Static_assert(__builtin_offsetof(struct datagram_flow, source) == {}, \"source_identity\");",
        offset_of!(DatagramFlow, source_identity)
    )
    .unwrap();
    check!(
        "grant",
        Grant {
            start_ns,
            original,
            source_workload,
            destination_workload,
            policy,
            service,
            original_port,
            reason,
            target,
            target_port,
            padding
        }
    );
    writeln!(
        source,
        "_Static_assert(__builtin_offsetof(struct grant, source) == {}, \"source_identity\");",
        offset_of!(Grant, source_identity)
    )
    .unwrap();
    check!(
        "socket_state",
        SocketState {
            netns,
            workload,
            socket_class,
            flags,
            refused_at,
            grant
        }
    );
    for (name, flag) in [
        ("SOCKET_ADMITTED", SocketState::ADMITTED),
        ("SOCKET_LOCAL", SocketState::LOCAL),
        ("SOCKET_CLIENT", SocketState::CLIENT),
        ("SOCKET_ESTABLISHED", SocketState::ESTABLISHED),
        ("SOCKET_FIN_ACKED", SocketState::FIN_ACKED),
        ("SOCKET_FIN_RECEIVED", SocketState::FIN_RECEIVED),
        ("SOCKET_REPLIES", SocketState::REPLIES),
        ("SOCKET_CAPTURED", SocketState::CAPTURED),
        ("DELIVERY_MARK", crate::DELIVERY_MARK),
        ("DELIVERY_MASK", crate::DELIVERY_MASK),
        ("PORT_OUTBOUND", crate::ports::OUTBOUND.into()),
        ("PORT_INBOUND", crate::ports::INBOUND.into()),
        ("PORT_HBONE", crate::ports::HBONE.into()),
        ("MARK_REPLIES", SocketState::MARK_REPLIES),
    ] {
        writeln!(source, "_Static_assert({name} == {flag}, \"{name}\");").unwrap();
    }
    check!(
        "datagram_flow",
        DatagramFlow {
            start_ns,
            last_ns,
            bytes_sent,
            bytes_received,
            original,
            source_workload,
            destination_workload,
            policy,
            service,
            packets_sent,
            packets_received,
            original_port,
            reason
        }
    );
    check!(
        "splice_connection",
        SpliceConnection {
            tuple,
            client_sequence,
            server_sequence
        }
    );
    check!(
        "splice_state",
        SpliceState {
            connection,
            side,
            sent,
            over_tcp,
            padding
        }
    );
    check!(
        "splice_pair",
        SplicePair {
            sent,
            read,
            ended,
            padding
        }
    );
    check!(
        "flow_event",
        FlowEvent {
            time_ns,
            duration_ns,
            cookie,
            bytes_sent,
            bytes_received,
            source,
            destination,
            original,
            source_workload,
            source_identity,
            destination_workload,
            policy,
            service,
            srtt_us,
            retransmits,
            source_port,
            destination_port,
            original_port,
            reason,
            kind,
            protocol,
            socket_class,
            flags
        }
    );
    for (name, value) in crate::Reason::C_NAMES {
        writeln!(source, "_Static_assert({name} == {value}, \"{name}\");").unwrap();
    }
    let names = crate::Reason::C_NAMES.len();
    writeln!(
        source,
        "_Static_assert(REASON_COUNT == {names}, \"a reason is missing in Rust\");"
    )
    .unwrap();

    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("layout.c");
    std::fs::write(&file, source).unwrap();
    let output = Command::new("clang")
        .args([
            "-target",
            "bpf",
            "-fsyntax-only",
            "-I/usr/include/x86_64-linux-gnu",
        ])
        .args(["-I/usr/include/aarch64-linux-gnu", "-Ibpf"])
        .arg(&file)
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
}
