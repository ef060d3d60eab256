//! TLS 1.3 records: sealed and opened with the keys that rustls derived (RFC 8446, section 5.2 and 5.3).

use std::io::IoSlice;

use aws_lc_rs::aead::{AES_128_GCM, AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use rustls::{
    ConnectionTrafficSecrets, Error, InvalidMessage,
    crypto::cipher::{AeadKey, Iv},
};

use super::buffer::Buffer;

/// Bytes of a record's header.
pub(super) const HEADER: usize = 5;
/// Most bytes that one record carries (section 5.1).
pub(super) const MAX_PLAIN: usize = 1 << 14;
/// What a record is longer than what it carries: header, type and tag.
pub(super) const OVERHEAD: usize = HEADER + 1 + TAG;
/// Longest record that is written.
pub(super) const MAX_SEALED: usize = MAX_PLAIN + OVERHEAD;
/// Longest that is read, without the header (section 5.2).
const MAX_READ: usize = MAX_PLAIN + 256;
const TAG: usize = 16;
/// The type that every record shows outside.
const OUTER_TYPE: u8 = 23;
/// Records after which other keys are taken: half of what keeps AES-GCM within its bounds (section 5.5).
const WORN: u64 = 1 << 23;

/// What a record carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Content {
    Alert = 21,
    Handshake = 22,
    Data = 23,
}

/// What was in a record: `length` bytes behind the header.
#[derive(Debug)]
pub(super) struct Opened {
    pub(super) content: Content,
    pub(super) length: usize,
}

/// Seals what is sent.
pub(super) struct Sealer(Key);

/// Opens what is received.
pub(super) struct Opener(Key);

struct Key {
    key: LessSafeKey,
    iv: [u8; 12],
    sequence: u64,
}

/// The length of the first record with its header, once all of it is there.
pub(super) fn length(bytes: &[u8]) -> Result<Option<usize>, Error> {
    let [kind, _, _, high, low, rest @ ..] = bytes else {
        return Ok(None);
    };
    if *kind != OUTER_TYPE {
        return Err(Error::InvalidMessage(InvalidMessage::InvalidContentType));
    }
    let length = usize::from(u16::from_be_bytes([*high, *low]));
    if length > MAX_READ {
        return Err(Error::PeerSentOversizedRecord);
    }
    if length <= TAG {
        return Err(Error::DecryptError);
    }
    Ok((rest.len() >= length).then_some(HEADER + length))
}

impl Sealer {
    pub(super) fn new(sequence: u64, secrets: &ConnectionTrafficSecrets) -> Result<Self, Error> {
        Key::new(sequence, secrets).map(Self)
    }

    /// Has it sealed so much that the next keys are due?
    pub(super) fn is_worn(&self) -> bool {
        self.0.sequence >= WORN
    }

    /// As if it had sealed that much.
    #[cfg(test)]
    pub(super) fn wear_out(&mut self) {
        self.0.sequence = WORN;
    }

    /// Seals a short message. There must be room for it.
    pub(super) fn seal(
        &mut self,
        content: Content,
        message: &[u8],
        out: &mut Buffer,
    ) -> Result<(), Error> {
        self.seal_record(content, &[IoSlice::new(message)], 0, message.len(), out)
    }

    /// Seals one record of data, which begins `skip` bytes into the slices; how much it took. There must be room for
    /// a record.
    pub(super) fn seal_some(
        &mut self,
        slices: &[IoSlice<'_>],
        skip: usize,
        out: &mut Buffer,
    ) -> Result<usize, Error> {
        let total: usize = slices.iter().map(|slice| slice.len()).sum();
        let count = (total - skip).min(MAX_PLAIN);
        self.seal_record(Content::Data, slices, skip, count, out)?;
        Ok(count)
    }

    fn seal_record(
        &mut self,
        content: Content,
        slices: &[IoSlice<'_>],
        mut skip: usize,
        count: usize,
        out: &mut Buffer,
    ) -> Result<(), Error> {
        let header = header(count + 1 + TAG);
        let record = out.extend(count + OVERHEAD);
        record[..HEADER].copy_from_slice(&header);
        let (body, trailer) = record[HEADER..].split_at_mut(count);
        let (nonce, aad, kind) = (self.0.nonce()?, Aad::from(header), [content as u8]);
        let mut at = 0;
        for slice in slices {
            let skipped = skip.min(slice.len());
            skip -= skipped;
            let part = &slice[skipped..];
            if at == 0 && part.len() >= count {
                // All of it lies in one piece: it is encrypted from there, without a copy.
                return self
                    .0
                    .key
                    .seal_out_of_place_scatter(nonce, aad, &part[..count], body, &kind, trailer)
                    .map_err(|_| Error::EncryptError);
            }
            let part = &part[..part.len().min(count - at)];
            body[at..][..part.len()].copy_from_slice(part);
            at += part.len();
        }
        self.0
            .key
            .seal_in_place_scatter(nonce, aad, body, &kind, trailer)
            .map_err(|_| Error::EncryptError)
    }
}

impl Opener {
    pub(super) fn new(sequence: u64, secrets: &ConnectionTrafficSecrets) -> Result<Self, Error> {
        Key::new(sequence, secrets).map(Self)
    }

    /// Opens a whole record in place.
    pub(super) fn open(&mut self, record: &mut [u8]) -> Result<Opened, Error> {
        let (head, body) = record.split_at_mut(HEADER);
        let nonce = self.0.nonce()?;
        let plain = self
            .0
            .key
            .open_in_place(nonce, Aad::from(&*head), body)
            .map_err(|_| Error::DecryptError)?;
        // The type stands behind the content, and zeros may follow as padding (section 5.4).
        let end = plain
            .iter()
            .rposition(|&byte| byte != 0)
            .ok_or(Error::InvalidMessage(InvalidMessage::InvalidContentType))?;
        if end > MAX_PLAIN {
            return Err(Error::PeerSentOversizedRecord);
        }
        let content = match plain[end] {
            21 => Content::Alert,
            22 => Content::Handshake,
            23 => Content::Data,
            _ => return Err(Error::InvalidMessage(InvalidMessage::InvalidContentType)),
        };
        Ok(Opened {
            content,
            length: end,
        })
    }
}

impl Key {
    fn new(sequence: u64, secrets: &ConnectionTrafficSecrets) -> Result<Self, Error> {
        let (algorithm, key, iv): (_, &AeadKey, &Iv) = match secrets {
            ConnectionTrafficSecrets::Aes128Gcm { key, iv } => (&AES_128_GCM, key, iv),
            ConnectionTrafficSecrets::Aes256Gcm { key, iv } => (&AES_256_GCM, key, iv),
            _ => return Err(Error::General("no AES-GCM suite".into())),
        };
        let key = UnboundKey::new(algorithm, key.as_ref())
            .map_err(|_| Error::General("a key of the wrong length".into()))?;
        let iv = iv
            .as_ref()
            .try_into()
            .map_err(|_| Error::General("an IV of the wrong length".into()))?;
        Ok(Self {
            key: LessSafeKey::new(key),
            iv,
            sequence,
        })
    }

    /// The next record's nonce: the IV with the record's number (section 5.3). No number is used twice.
    fn nonce(&mut self) -> Result<Nonce, Error> {
        let mut nonce = self.iv;
        for (byte, number) in nonce[4..].iter_mut().zip(self.sequence.to_be_bytes()) {
            *byte ^= number;
        }
        self.sequence = self.sequence.checked_add(1).ok_or(Error::EncryptError)?;
        Ok(Nonce::assume_unique_for_key(nonce))
    }
}

fn header(length: usize) -> [u8; HEADER] {
    let [high, low] = (length as u16).to_be_bytes();
    [OUTER_TYPE, 3, 3, high, low]
}
