//! Makes `:authority` acceptable on its way in: many gRPC clients write a socket's path there, and our HTTP/2 library takes that
//! for a malformed request (RFC 9113, section 8.3.1: it has to be a host).
//!
//! gRPC's C core (so Python, C++, Ruby, PHP) sends the path percent-encoded, grpc-java as it is. The bytes that no host has
//! are replaced one by one in the header block (HPACK, RFC 7541), so that neither lengths nor the
//! dynamic table change. Nobody reads the value: there is one server on the socket. What is not understood passes
//! as it is, and the library judges it.

use std::ops::Range;

/// Length of the client connection preface (RFC 9113, section 3.4).
const PREFACE: usize = 24;
const FRAME_HEADER: usize = 9;
/// Largest frame that this server allows (the initial SETTINGS_MAX_FRAME_SIZE); a larger one ends the connection anyway.
const MAX_FRAME: usize = 16 * 1024;
const HEADERS: u8 = 1;
const PADDED: u8 = 0x08;
const PRIORITY: u8 = 0x20;
/// Index of `:authority` in the static table (RFC 7541, appendix A).
const AUTHORITY_INDEX: usize = 1;

/// The client's bytes, frame by frame.
#[derive(Debug)]
pub(super) struct Rewriter {
    state: State,
}

#[derive(Debug)]
enum State {
    /// This many bytes pass.
    Pass(usize),
    /// The beginning of a frame.
    Head(Vec<u8>),
    /// A HEADERS frame of this length in all, collected.
    Block(Vec<u8>, usize),
}

impl Rewriter {
    pub(super) fn new() -> Self {
        Self {
            state: State::Pass(PREFACE),
        }
    }

    /// Takes bytes in and appends to `output` what may go on. Holds one frame back at most.
    pub(super) fn push(&mut self, mut input: &[u8], output: &mut Vec<u8>) {
        while !input.is_empty() {
            match &mut self.state {
                State::Pass(left) => {
                    let count = (*left).min(input.len());
                    output.extend_from_slice(take(&mut input, count));
                    *left -= count;
                    if *left == 0 {
                        self.state = State::Head(Vec::with_capacity(FRAME_HEADER));
                    }
                }
                State::Head(head) => {
                    let count = (FRAME_HEADER - head.len()).min(input.len());
                    head.extend_from_slice(take(&mut input, count));
                    if let [a, b, c, kind, _, _, _, _, _] = head[..] {
                        let length = usize::from(a) << 16 | usize::from(b) << 8 | usize::from(c);
                        let head = std::mem::take(head);
                        self.begin(head, kind, length, output);
                    }
                }
                State::Block(frame, length) => {
                    let count = (*length - frame.len()).min(input.len());
                    frame.extend_from_slice(take(&mut input, count));
                    if frame.len() == *length {
                        if let Some(block) = header_block(frame) {
                            // A block that goes on in another frame, or is malformed, has been dealt with as far as it goes.
                            let _ = rewrite(&mut frame[block]);
                        }
                        output.append(frame);
                        self.state = State::Head(Vec::with_capacity(FRAME_HEADER));
                    }
                }
            }
        }
    }

    /// At the end of the stream: what was held back.
    pub(super) fn finish(&mut self, output: &mut Vec<u8>) {
        if let State::Head(held) | State::Block(held, _) = &mut self.state {
            output.append(held);
        }
    }

    fn begin(&mut self, mut head: Vec<u8>, kind: u8, length: usize, output: &mut Vec<u8>) {
        self.state = if kind == HEADERS && (1..=MAX_FRAME).contains(&length) {
            State::Block(head, FRAME_HEADER + length)
        } else {
            output.append(&mut head);
            match length {
                0 => State::Head(head),
                length => State::Pass(length),
            }
        };
    }
}

fn take<'a>(input: &mut &'a [u8], count: usize) -> &'a [u8] {
    let (taken, rest) = input.split_at(count);
    *input = rest;
    taken
}

/// Where the header block lies in a HEADERS frame (RFC 9113, section 6.2).
fn header_block(frame: &[u8]) -> Option<Range<usize>> {
    let flags = *frame.get(4)?;
    let mut start = FRAME_HEADER;
    let mut end = frame.len();
    if flags & PADDED != 0 {
        end = end.checked_sub(usize::from(*frame.get(start)?))?;
        start += 1;
    }
    if flags & PRIORITY != 0 {
        start += 5;
    }
    (start <= end).then_some(start..end)
}

/// Walks over the fields of a header block; `None` where it ends too early.
fn rewrite(block: &mut [u8]) -> Option<()> {
    let mut at = 0;
    while let Some(&first) = block.get(at) {
        // RFC 7541, section 6: an indexed field, a table size, or a literal with or without indexing.
        if first & 0x80 != 0 {
            integer(block, &mut at, 7)?;
            continue;
        }
        if first & 0xe0 == 0x20 {
            integer(block, &mut at, 5)?;
            continue;
        }
        let prefix = if first & 0x40 != 0 { 6 } else { 4 };
        let is_authority = match integer(block, &mut at, prefix)? {
            0 => {
                let (name, _) = string(block, &mut at)?;
                &block[name] == b":authority"
            }
            index => index == AUTHORITY_INDEX,
        };
        let (value, huffman) = string(block, &mut at)?;
        if is_authority && !huffman {
            make_a_host(&mut block[value]);
        }
    }
    Some(())
}

/// Where a string lies, and whether it is Huffman coded (RFC 7541, section 5.2).
fn string(block: &[u8], at: &mut usize) -> Option<(Range<usize>, bool)> {
    let huffman = block.get(*at)? & 0x80 != 0;
    let length = integer(block, at, 7)?;
    let end = at.checked_add(length).filter(|end| *end <= block.len())?;
    let range = *at..end;
    *at = end;
    Some((range, huffman))
}

/// An integer with a prefix of so many bits (RFC 7541, section 5.1); no length here needs more than three further bytes.
fn integer(block: &[u8], at: &mut usize, prefix: u32) -> Option<usize> {
    let mask = (1_usize << prefix) - 1;
    let mut value = usize::from(*block.get(*at)?) & mask;
    *at += 1;
    if value < mask {
        return Some(value);
    }
    for shift in [0, 7, 14] {
        let byte = usize::from(*block.get(*at)?);
        *at += 1;
        value += (byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

fn make_a_host(authority: &mut [u8]) {
    if authority.iter().any(|byte| matches!(byte, b'%' | b'/')) {
        for byte in authority {
            if !byte.is_ascii_alphanumeric() && *byte != b'.' {
                *byte = b'-';
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const START: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00";
    /// Fields as gRPC's C core writes them: literal names, indexed values.
    const BEFORE: &[u8] =
        b"@\x05:path\x05/S%/F@\x0a:authority\x0ctmp%2Fa.sock\x83\x86@\x02te\x08trailers";
    const AFTER: &[u8] =
        b"@\x05:path\x05/S%/F@\x0a:authority\x0ctmp-2Fa.sock\x83\x86@\x02te\x08trailers";

    fn frame(kind: u8, flags: u8, payload: &[u8]) -> Vec<u8> {
        let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
        [&length[1..], &[kind, flags, 0, 0, 0, 1], payload].concat()
    }

    fn through(chunks: &[&[u8]]) -> Vec<u8> {
        let mut rewriter = Rewriter::new();
        let mut output = Vec::new();
        for chunk in chunks {
            rewriter.push(chunk, &mut output);
        }
        rewriter.finish(&mut output);
        output
    }

    fn header_frame_becomes(before: &[u8], after: &[u8], flags: u8) {
        let data = frame(0, 0, b"x@\x0a:authority\x02a/");
        let input = [START, &frame(HEADERS, flags, before), &data].concat();
        let expected = [START, &frame(HEADERS, flags, after), &data].concat();
        assert_eq!(through(&[&input]), expected);
        let bytes: Vec<&[u8]> = input.chunks(1).collect();
        assert_eq!(through(&bytes), expected, "byte by byte");
    }

    #[test]
    fn a_path_becomes_a_host_and_nothing_else_changes() {
        header_frame_becomes(BEFORE, AFTER, 0x4);
        let padded = |block: &[u8]| [&[2, 0, 0, 0, 0, 9], block, b"//"].concat();
        header_frame_becomes(&padded(BEFORE), &padded(AFTER), 0x4 | PADDED | PRIORITY);
        // The static table's name, with and without indexing; a long path as grpc-java sends it.
        let path = format!("/run/{}/agent.sock", "d".repeat(200));
        let host = path.replace('/', "-");
        for first in [0x41, 0x01, 0x11] {
            let field = |value: &str| {
                let length = value.len() - 127;
                let low = u8::try_from(length % 128).unwrap() + 0x80 * u8::from(length > 127);
                let mut field = vec![0x3f, 0xe1, 0x1f, first, 0x7f, low];
                if length > 127 {
                    field.push(u8::try_from(length / 128).unwrap());
                }
                [&field, value.as_bytes()].concat()
            };
            header_frame_becomes(&field(&path), &field(&host), 0x4);
        }
    }

    #[test]
    fn hosts_and_what_is_not_understood_pass() {
        for block in [
            b"@\x0a:authority\x09localhost".as_slice(),
            b"\x41\x0e[fd00::1]:8080",
            // Huffman coded, cut short, and a length without end.
            b"\x41\x82%/",
            b"\x41\x7f",
            b"\x41\x05a/",
            b"\x41\x7f\xff\xff\xff\xff\xff/",
        ] {
            header_frame_becomes(block, block, 0x4);
        }
        // More padding than there is, and no room for a priority.
        header_frame_becomes(b"\xff\x41\x02a/", b"\xff\x41\x02a/", PADDED);
        header_frame_becomes(b"\x41", b"\x41", PRIORITY);
        let cut = [START, &frame(HEADERS, 4, BEFORE)[..20]].concat();
        assert_eq!(through(&[&cut]), cut);
        let huge = [START, &frame(HEADERS, 4, &vec![b'/'; MAX_FRAME + 1])].concat();
        assert_eq!(through(&[&huge]), huge);
    }

    proptest! {
        #[test]
        fn noise_keeps_its_length(noise in proptest::collection::vec(any::<u8>(), 0..200), cut in 0_usize..200) {
            let input = [START, &frame(HEADERS, 4, &noise), &noise].concat();
            let (one, two) = input.split_at(cut.min(input.len()));
            let output = through(&[one, two]);
            prop_assert_eq!(output.len(), input.len());
            prop_assert_eq!(output, through(&[&input]));
        }
    }
}
