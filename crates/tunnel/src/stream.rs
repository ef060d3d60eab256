//! A TLS 1.3 connection as bytes in and out: what HTTP/2 runs on.
//!
//! rustls does the handshake and derives every key; the records after it are sealed and opened here, because that is
//! where a tunnel spends its time. Reads take from the socket whatever is there, tens of records at a time, and open
//! them in place; writes collect sealed records until they are flushed, so that one turn of the connection is one
//! system call. The buffers belong to the worker and are lent: an idle connection holds none.
//!
//! - `handshake`: drives rustls, and answers with the alert that it asks for
//! - `record`: seals and opens (RFC 8446, section 5)
//! - `buffer`: the worker's buffers

mod buffer;
mod handshake;
mod record;

use std::{
    io::{self, IoSlice},
    pin::Pin,
    sync::{Arc, OnceLock},
    task::{Context, Poll, ready},
};

use rustls::{
    AlertDescription, Error as RustlsError, PeerMisbehaved,
    kernel::KernelConnection,
    pki_types::{CertificateDer, ServerName},
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
};

use self::{
    buffer::Buffer,
    record::{Content, Opener, Sealer},
};
use crate::{ClientTls, ServerTls, TlsFailure};

/// Records in a row that carry no data (key updates, tickets, empty ones) before a peer is taken for hostile.
const MAX_WITHOUT_DATA: u32 = 32;
/// Longest handshake message that is taken after the handshake: a session ticket, which is dropped.
const MAX_MESSAGE: usize = 70_000;
/// `HandshakeType::NewSessionTicket` (RFC 8446, section 4).
const NEW_SESSION_TICKET: u8 = 4;
/// `HandshakeType::KeyUpdate`.
const KEY_UPDATE: u8 = 24;
/// A whole KeyUpdate that does not ask for one in return.
const KEY_UPDATE_MESSAGE: [u8; 5] = [KEY_UPDATE, 0, 0, 1, 0];

/// What is known of a peer after the handshake.
pub(crate) struct Handshaken {
    pub(crate) stream: TlsStream,
    /// The peer's certificate.
    pub(crate) certificate: CertificateDer<'static>,
    /// How TLS will fail, if it does.
    pub(crate) failure: Failure,
}

/// How TLS failed. HTTP/2 keeps only the text of an error; and the server's verdict on a client's certificate comes
/// after the client's handshake is done.
pub(crate) type Failure = Arc<OnceLock<TlsFailure>>;

/// Accepts.
pub(crate) async fn accept(tcp: TcpStream, tls: &ServerTls) -> io::Result<Handshaken> {
    let connection = rustls::server::UnbufferedServerConnection::new(Arc::clone(&tls.config))
        .map_err(tls_error)?;
    handshake::run(tcp, connection).await
}

/// Connects. The peer's identity is checked, not its name.
pub(crate) async fn connect(tcp: TcpStream, tls: &ClientTls) -> io::Result<Handshaken> {
    let name = ServerName::IpAddress(tcp.peer_addr()?.ip().into());
    let connection = rustls::client::UnbufferedClientConnection::new(Arc::clone(&tls.config), name)
        .map_err(tls_error)?;
    handshake::run(tcp, connection).await
}

fn tls_error(error: RustlsError) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

/// Derives the next keys of a connection.
trait Keys: Send {
    fn next_sealer(&mut self) -> Result<Sealer, RustlsError>;
    fn next_opener(&mut self) -> Result<Opener, RustlsError>;
}

impl<D: Send> Keys for KernelConnection<D> {
    fn next_sealer(&mut self) -> Result<Sealer, RustlsError> {
        let (sequence, secrets) = self.update_tx_secret()?;
        Sealer::new(sequence, &secrets)
    }

    fn next_opener(&mut self) -> Result<Opener, RustlsError> {
        let (sequence, secrets) = self.update_rx_secret()?;
        Opener::new(sequence, &secrets)
    }
}

/// An established connection.
pub(crate) struct TlsStream {
    tcp: TcpStream,
    keys: Box<dyn Keys>,
    sealer: Sealer,
    opener: Opener,
    /// Sealed records that wait to be written.
    outbox: Option<Buffer>,
    /// What was read from the socket: first `plain` bytes that are opened, then records.
    inbox: Option<Buffer>,
    plain: usize,
    /// Bytes behind the `plain` ones that belong to the same record: padding and tag.
    trailer: usize,
    /// The beginning of a handshake message.
    message: Vec<u8>,
    without_data: u32,
    /// The peer has said that it sends no more.
    ended: bool,
    failure: Failure,
    closing: bool,
}

impl TlsStream {
    fn new(tcp: TcpStream, keys: Box<dyn Keys>, sealer: Sealer, opener: Opener) -> Self {
        Self {
            tcp,
            keys,
            sealer,
            opener,
            outbox: None,
            inbox: None,
            plain: 0,
            trailer: 0,
            message: Vec::new(),
            without_data: 0,
            ended: false,
            failure: Failure::default(),
            closing: false,
        }
    }

    /// Begins with what the handshake has read beyond its end: `early` bytes that are opened, and records.
    fn resume(&mut self, inbox: Buffer, early: &[u8]) -> io::Result<()> {
        let mut all = Buffer::take();
        if early.len() + inbox.filled().len() > all.room() {
            return Err(tls_error(RustlsError::PeerSentOversizedRecord));
        }
        all.extend(early.len()).copy_from_slice(early);
        all.extend(inbox.filled().len())
            .copy_from_slice(inbox.filled());
        self.plain = early.len();
        self.inbox = Some(all);
        Ok(())
    }

    /// Gives bytes that are opened already, as many as there is room for.
    fn deliver(&mut self, out: &mut ReadBuf<'_>) {
        let Some(inbox) = &mut self.inbox else { return };
        let count = self.plain.min(out.remaining());
        out.put_slice(&inbox.filled()[..count]);
        inbox.consume(count);
        self.plain -= count;
        if self.plain == 0 {
            inbox.consume(std::mem::take(&mut self.trailer));
        }
    }

    /// Opens the next record if it is there as a whole. Afterwards there may be plain bytes, or not.
    fn open_next(&mut self) -> Result<bool, RustlsError> {
        let Some(inbox) = &mut self.inbox else {
            return Ok(false);
        };
        let Some(length) = record::length(inbox.filled())? else {
            return Ok(false);
        };
        let opened = self.opener.open(&mut inbox.filled_mut()[..length])?;
        self.without_data += 1;
        if self.without_data > MAX_WITHOUT_DATA {
            return Err(PeerMisbehaved::TooManyEmptyFragments.into());
        }
        match opened.content {
            Content::Data if opened.length > 0 && self.message.is_empty() => {
                self.without_data = 0;
                inbox.consume(record::HEADER);
                self.plain = opened.length;
                self.trailer = length - record::HEADER - opened.length;
            }
            Content::Data if opened.length == 0 => inbox.consume(length),
            Content::Data => {
                return Err(PeerMisbehaved::MessageInterleavedWithHandshakeMessage.into());
            }
            Content::Alert => {
                let alert: [u8; 2] = inbox.filled()[record::HEADER..][..opened.length]
                    .try_into()
                    .map_err(|_| {
                        RustlsError::InvalidMessage(rustls::InvalidMessage::InvalidContentType)
                    })?;
                inbox.consume(length);
                match AlertDescription::from(alert[1]) {
                    AlertDescription::CloseNotify => self.ended = true,
                    AlertDescription::UserCanceled => {}
                    alert => return Err(RustlsError::AlertReceived(alert)),
                }
            }
            Content::Handshake => {
                let message = &inbox.filled()[record::HEADER..][..opened.length];
                self.message.extend_from_slice(message);
                inbox.consume(length);
                self.handshake_messages()?;
            }
        }
        Ok(true)
    }

    /// What may come after the handshake: tickets, which are of no use here, and new keys.
    fn handshake_messages(&mut self) -> Result<(), RustlsError> {
        while let [kind, a, b, c, rest @ ..] = &self.message[..] {
            let length = u32::from_be_bytes([0, *a, *b, *c]) as usize;
            if length > MAX_MESSAGE {
                return Err(RustlsError::InvalidMessage(
                    rustls::InvalidMessage::HandshakePayloadTooLarge,
                ));
            }
            if rest.len() < length {
                return Ok(());
            }
            match (*kind, &rest[..length]) {
                (NEW_SESSION_TICKET, _) => {
                    self.message.drain(..4 + length);
                }
                (KEY_UPDATE, [asks @ (0 | 1)]) => {
                    let asks = *asks == 1;
                    if rest.len() > length {
                        // RFC 8446, section 5.1: nothing may follow in the same record.
                        return Err(PeerMisbehaved::KeyEpochWithPendingFragment.into());
                    }
                    self.message = Vec::new();
                    self.opener = self.keys.next_opener()?;
                    if asks {
                        self.update_sealer()?;
                    }
                }
                _ => {
                    return Err(RustlsError::InvalidMessage(
                        rustls::InvalidMessage::UnexpectedMessage("after the handshake"),
                    ));
                }
            }
        }
        Ok(())
    }

    /// Tells the peer that what follows is sealed with the next keys, and does so.
    fn update_sealer(&mut self) -> Result<(), RustlsError> {
        let outbox = self.outbox.get_or_insert_with(Buffer::take);
        self.sealer
            .seal(Content::Handshake, &KEY_UPDATE_MESSAGE, outbox)?;
        self.sealer = self.keys.next_sealer()?;
        Ok(())
    }

    /// Tells the peer why the connection ends, if the socket takes it at once.
    fn alert(&mut self, cx: &mut Context<'_>, error: &RustlsError) {
        if matches!(error, RustlsError::AlertReceived(_)) {
            return;
        }
        let alert = match error {
            RustlsError::DecryptError => AlertDescription::BadRecordMac,
            RustlsError::PeerSentOversizedRecord => AlertDescription::RecordOverflow,
            _ => AlertDescription::UnexpectedMessage,
        };
        let outbox = self.outbox.get_or_insert_with(Buffer::take);
        let fatal = 2;
        if outbox.room() >= record::OVERHEAD + 2
            && self
                .sealer
                .seal(Content::Alert, &[fatal, u8::from(alert)], outbox)
                .is_ok()
        {
            // The error that is reported is the one that led here.
            let _ = self.poll_send(cx);
        }
    }

    fn poll_fill(&mut self, cx: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = out.filled().len();
        loop {
            self.deliver(out);
            let full = self.plain > 0 || out.remaining() == 0;
            if full || self.ended {
                break;
            }
            match self.open_next() {
                Ok(true) => continue,
                Ok(false) => {}
                Err(error) => {
                    self.alert(cx, &error);
                    // It fails once: nothing is read after that.
                    let _ = self.failure.set(TlsFailure::of(&error));
                    self.ended = true;
                    return Poll::Ready(Err(tls_error(error)));
                }
            }
            if out.filled().len() > before {
                break;
            }
            let inbox = self.inbox.get_or_insert_with(Buffer::take);
            match inbox.poll_fill(&mut self.tcp, cx) {
                Poll::Ready(Ok(0)) => return Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into())),
                Poll::Ready(Ok(_)) => {}
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                Poll::Pending => {
                    self.lend_back();
                    return Poll::Pending;
                }
            }
        }
        self.lend_back();
        Poll::Ready(Ok(()))
    }

    fn lend_back(&mut self) {
        if self.inbox.as_ref().is_some_and(Buffer::is_empty) {
            self.inbox = None;
        }
    }

    /// Writes what is sealed.
    fn poll_send(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if let Some(outbox) = &mut self.outbox {
            while !outbox.is_empty() {
                let count = ready!(Pin::new(&mut self.tcp).poll_write(cx, outbox.filled()))?;
                if count == 0 {
                    return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
                }
                outbox.consume(count);
            }
            self.outbox = None;
        }
        Poll::Ready(Ok(()))
    }

    /// Room for at least one record, and for new keys before it.
    fn poll_room(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let full = |outbox: &Buffer| outbox.room() < 2 * record::MAX_SEALED;
        if self.outbox.as_ref().is_some_and(full) {
            ready!(self.poll_send(cx))?;
        }
        if self.sealer.is_worn() {
            self.update_sealer().map_err(tls_error)?;
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncRead for TlsStream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        out: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.get_mut().poll_fill(cx, out)
    }
}

impl AsyncWrite for TlsStream {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[IoSlice::new(bytes)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let total: usize = slices.iter().map(|slice| slice.len()).sum();
        let mut written = 0;
        while written < total {
            match this.poll_room(cx) {
                Poll::Ready(Ok(())) => {}
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                Poll::Pending if written > 0 => break,
                Poll::Pending => return Poll::Pending,
            }
            let outbox = this.outbox.get_or_insert_with(Buffer::take);
            written += this
                .sealer
                .seal_some(slices, written, outbox)
                .map_err(tls_error)?;
        }
        Poll::Ready(Ok(written))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.get_mut().poll_send(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if !this.closing {
            ready!(this.poll_room(cx))?;
            let outbox = this.outbox.get_or_insert_with(Buffer::take);
            let warning = 1;
            this.sealer
                .seal(
                    Content::Alert,
                    &[warning, u8::from(AlertDescription::CloseNotify)],
                    outbox,
                )
                .map_err(tls_error)?;
            this.closing = true;
        }
        ready!(this.poll_send(cx))?;
        Pin::new(&mut this.tcp).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests;
