//! The reader against messages built here, and against noise.

use proptest::{collection::vec, prelude::*};

use super::*;

/// A socket's message as the kernel would write it.
fn socket_message(sequence: u32, flags: u16, socket: &Socket) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.extend(0_u32.to_ne_bytes());
    bytes.extend(SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    bytes.extend(flags.to_ne_bytes());
    bytes.extend(sequence.to_ne_bytes());
    bytes.extend([0; 4]);
    bytes.extend([family_number(socket.family), socket.state as u8, 0, 0]);
    bytes.extend(socket.id);
    bytes.extend([0; ANSWER - 4 - SOCKET_ID]);
    if let Some(cgroup) = socket.cgroup {
        put_attribute(&mut bytes, INET_DIAG_CGROUP_ID, &cgroup.to_ne_bytes());
    }
    put_attribute(&mut bytes, INET_DIAG_MARK, &socket.mark.to_ne_bytes());
    if let Some(figures) = socket.figures {
        let mut info = vec![0; FIGURES + 100];
        info[68..72].copy_from_slice(&figures.rtt_us.to_ne_bytes());
        info[100..104].copy_from_slice(&figures.retransmits.to_ne_bytes());
        info[120..128].copy_from_slice(&figures.bytes_acked.to_ne_bytes());
        info[128..136].copy_from_slice(&figures.bytes_received.to_ne_bytes());
        put_attribute(&mut bytes, INET_DIAG_INFO, &info);
    }
    let mut storages = Vec::new();
    for (map, value) in &socket.storages {
        let mut parts = Vec::new();
        put_attribute(&mut parts, SK_DIAG_BPF_STORAGE_MAP_ID, &map.to_ne_bytes());
        put_attribute(&mut parts, 1, &[]); // padding, as the kernel aligns values to eight bytes
        put_attribute(&mut parts, SK_DIAG_BPF_STORAGE_MAP_VALUE, value);
        put_attribute(&mut storages, SK_DIAG_BPF_STORAGE | NLA_F_NESTED, &parts);
    }
    if !storages.is_empty() {
        put_attribute(&mut bytes, INET_DIAG_SK_BPF_STORAGES, &storages);
    }
    finish(bytes)
}

fn any_socket() -> impl Strategy<Value = Socket> {
    let figures = (any::<u64>(), any::<u64>(), any::<u32>(), any::<u32>()).prop_map(
        |(bytes_acked, bytes_received, rtt_us, retransmits)| Figures {
            bytes_acked,
            bytes_received,
            rtt_us,
            retransmits,
        },
    );
    (
        any::<bool>(),
        0..State::ALL.len(),
        any::<[u8; 32]>(),
        any::<([u8; 16], u32)>(),
        proptest::option::of(any::<u64>()),
        proptest::option::of(figures),
        vec((any::<u32>(), vec(any::<u8>(), 0..200)), 0..3),
    )
        .prop_map(
            |(v6, state, first, (second, mark), cgroup, figures, storages)| {
                let family = if v6 { Family::V6 } else { Family::V4 };
                let mut id = [0; SOCKET_ID];
                id[..32].copy_from_slice(&first);
                id[32..].copy_from_slice(&second);
                Socket {
                    family,
                    state: State::ALL[state],
                    local: endpoint(family, &id, 0, 4),
                    remote: endpoint(family, &id, 2, 20),
                    cookie: number_u64(&id, 40).unwrap(),
                    cgroup,
                    mark,
                    figures,
                    storages,
                    id,
                }
            },
        )
}

proptest! {
    #[test]
    fn what_the_kernel_writes_is_read(sockets in vec(any_socket(), 0..8), sequence: u32, interrupted: bool) {
        let flags = if interrupted { NLM_F_DUMP_INTR } else { 0 };
        let datagram: Vec<u8> = sockets
            .iter()
            .flat_map(|socket| {
                let mut message = socket_message(sequence, flags, socket);
                message.resize(align(message.len()), 0);
                message
            })
            .collect();
        let read: Vec<Received> = messages(&datagram).collect::<io::Result<_>>().unwrap();
        prop_assert_eq!(read.len(), sockets.len());
        for (message, socket) in read.iter().zip(&sockets) {
            prop_assert_eq!(message.sequence, sequence);
            prop_assert_eq!(message.interrupted, interrupted);
            let Message::Socket(read) = &message.content else {
                panic!("no socket: {message:?}");
            };
            prop_assert_eq!(&**read, socket);
        }
    }

    /// Whatever comes: no panic, no endless loop, and nothing after an error.
    #[test]
    fn noise_is_survived(noise in vec(any::<u8>(), 0..600)) {
        let mut failed = false;
        for message in messages(&noise) {
            prop_assert!(!failed || message.is_ok());
            failed |= message.is_err();
        }
    }

    /// A message cut short or with any byte changed is an error or another message, never a panic.
    #[test]
    fn damaged_messages_are_survived(socket in any_socket(), cut in 0_usize..400, at in 0_usize..400, byte: u8) {
        let mut message = socket_message(1, 0, &socket);
        let length = message.len();
        message.truncate(cut.min(length));
        let whole = message.len() == length;
        if let Some(changed) = message.get_mut(at) {
            *changed = byte;
        }
        let read: Vec<_> = messages(&message).collect();
        prop_assert!(whole || read.is_empty() || read.iter().any(Result::is_err) || at < 4);
    }
}

#[test]
fn errors_and_ends_carry_their_numbers() {
    let message = |kind: u16, payload: &[u8]| {
        let mut bytes = vec![0; HEADER];
        bytes[4..6].copy_from_slice(&kind.to_ne_bytes());
        bytes.extend(payload);
        let bytes = finish(bytes);
        messages(&bytes).next().unwrap().map(|read| read.content)
    };
    let number = |errno: i32| (-errno).to_ne_bytes();
    assert!(matches!(
        message(NLMSG_ERROR, &number(libc::ENOENT)),
        Ok(Message::Error(libc::ENOENT))
    ));
    assert!(matches!(
        message(NLMSG_ERROR, &[0; 20]),
        Ok(Message::Error(0))
    ));
    assert!(matches!(
        message(NLMSG_DONE, &number(libc::ENOBUFS)),
        Ok(Message::Done(libc::ENOBUFS))
    ));
    assert!(matches!(message(NLMSG_DONE, &[]), Ok(Message::Done(0))));
    assert!(matches!(message(1, &[]), Ok(Message::Other)));
    assert!(message(NLMSG_ERROR, &[1, 2]).is_err());
    assert!(message(SOCK_DIAG_BY_FAMILY, &[0; ANSWER - 1]).is_err());
}
