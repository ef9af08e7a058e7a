//! Tap interfaces of the host: the other end of a guest's network card.
//!
//! An interface belongs to whoever set the network up: it was made before (`ip tuntap add`), stays
//! afterwards, and forkd only needs the right to open it. The daemon opens it, because the process
//! of a machine is confined and reaches no device by name; the process gets the open file.
//!
//! Invariants: nothing here makes an interface that stays, or removes one; every frame has the
//! header of virtio version 1 before it ([`HEADER`] bytes) in both directions; reads and writes
//! never wait.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt as _;

use format::{Error, Kind, Result};

/// Where interfaces are opened.
const DEVICE: &str = "/dev/net/tun";
/// Bytes of an interface's name at most.
pub const NAME_MAX: usize = libc::IFNAMSIZ - 1;
/// Bytes of the header before each frame.
pub const HEADER: usize = 12;

/// What the host may leave to the guest in frames that it gives.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Offload {
    /// Sums need not be there yet.
    pub sums: bool,
    /// TCP segments over IPv4 may be larger than what goes over a wire.
    pub tcp4: bool,
    /// The same over IPv6.
    pub tcp6: bool,
}

/// An open tap interface.
#[derive(Debug)]
pub struct Tap {
    name: String,
    file: OwnedFd,
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

fn object(name: &str) -> String {
    format!("interface {name}")
}

/// Refuses what no interface is called.
///
/// # Errors
/// `Invalid`, saying what is wrong.
pub fn check_name(name: &str) -> Result<()> {
    let ok = |c: char| c.is_ascii_graphic() && !"/:{}%".contains(c);
    if !name.is_empty() && name.len() <= NAME_MAX && name.chars().all(ok) && name != "." {
        return Ok(());
    }
    let reason = format!("the name of an interface has 1 to {NAME_MAX} characters, no / : % {{ }}");
    Err(Error::invalid(reason).on(format!("interface {name:?}")))
}

/// A request about an interface, zeroed but for its name.
fn request(name: &str) -> libc::ifreq {
    // SAFETY: all bits zero is a value of this plain structure.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes().take(NAME_MAX)) {
        *to = from.cast_signed();
    }
    request
}

impl Tap {
    /// Opens the interface `name`, whose link is down towards the host until
    /// [`Tap::set_carrier`].
    ///
    /// # Errors
    /// `NotFound` when there is none; `Invalid` when it is of another kind; `InUse` when somebody
    /// has it; `ReadOnly` without the right to open it; `Unsupported` when the host has no taps.
    pub fn open(name: &str) -> Result<Tap> {
        check_name(name)?;
        Tap::open_checked(name).map_err(|e| e.tried("open").on(object(name)))
    }

    fn open_checked(name: &str) -> Result<Tap> {
        let missing = || {
            let reason = "there is no such interface";
            let hint = format!("make it first: `ip tuntap add dev {name} mode tap`");
            Error::new(Kind::NotFound, reason).hint(hint)
        };
        let text = std::ffi::CString::new(name).map_err(|_| Error::invalid("not a name"))?;
        // SAFETY: reads a string that ends in a zero byte.
        if unsafe { libc::if_nametoindex(text.as_ptr()) } == 0 {
            return Err(missing());
        }
        let mut options = File::options();
        let file = options.read(true).write(true).custom_flags(libc::O_NONBLOCK).open(DEVICE);
        let file = file.map_err(|e| {
            let hint = format!("{DEVICE} has to be there, for the user that forkd runs as");
            Error::new(Kind::Unsupported, format!("{DEVICE} cannot be opened"))
                .caused_by(e)
                .hint(hint)
        })?;
        let tap = Tap { name: name.to_owned(), file: file.into() };
        let mut wanted = request(name);
        let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        wanted.ifr_ifru.ifru_flags = libc::c_short::try_from(flags).unwrap_or(0);
        tap.call(libc::TUNSETIFF, (&raw mut wanted).cast()).map_err(refused)?;
        let mut got = request(name);
        tap.call(libc::TUNGETIFF, (&raw mut got).cast())?;
        // SAFETY: the kernel has just filled this member in.
        let flags = libc::c_int::from(unsafe { got.ifr_ifru.ifru_flags });
        if flags & libc::IFF_PERSIST == 0 {
            // It was removed a moment ago, and made by the call above: it goes with the file.
            return Err(missing());
        }
        tap.set_carrier(false);
        let mut header = libc::c_int::try_from(HEADER).unwrap_or(0);
        tap.call(libc::TUNSETVNETHDRSZ, (&raw mut header).cast())?;
        tap.set_offload(Offload::default())?;
        Ok(tap)
    }

    /// An interface that another process opened.
    #[must_use]
    pub fn from_file(name: String, file: OwnedFd) -> Tap {
        Tap { name, file }
    }

    /// What it is called.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    fn call(&self, request: libc::c_ulong, argument: *mut libc::c_void) -> io::Result<()> {
        // SAFETY: callers pass what the request reads or writes, which lives until the call is
        // over.
        match unsafe { libc::ioctl(self.file.as_raw_fd(), request, argument) } {
            -1 => Err(io::Error::last_os_error()),
            _ => Ok(()),
        }
    }

    /// Says what the host may leave to the guest.
    ///
    /// # Errors
    /// The host's error.
    pub fn set_offload(&self, may: Offload) -> Result<()> {
        let bit = |on: bool, bit: libc::c_uint| if on { bit } else { 0 };
        let sums = bit(may.sums, libc::TUN_F_CSUM);
        let segments = bit(may.tcp4, libc::TUN_F_TSO4) | bit(may.tcp6, libc::TUN_F_TSO6);
        // The kernel takes segments only together with sums.
        let flags = if may.sums { sums | segments } else { 0 };
        let argument = std::ptr::without_provenance_mut(flags as usize);
        self.call(libc::TUNSETOFFLOAD, argument)
            .map_err(|e| Error::from(e).tried("set up").on(object(&self.name)))
    }

    /// Shows the host whether there is somebody at the other end. A host that cannot show it sees
    /// a link that is always up.
    pub fn set_carrier(&self, up: bool) {
        let mut carrier = libc::c_int::from(up);
        let _ = self.call(libc::TUNSETCARRIER, (&raw mut carrier).cast());
    }

    /// Takes a frame with its header; gives back how many bytes, or `None` when none waits.
    ///
    /// # Errors
    /// The host's error; [`is_gone`] tells whether the interface is gone.
    pub fn read(&self, into: &mut [u8]) -> io::Result<Option<usize>> {
        // SAFETY: the buffer is valid for its length.
        let got =
            unsafe { libc::read(self.file.as_raw_fd(), into.as_mut_ptr().cast(), into.len()) };
        match usize::try_from(got) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(_) => not_now(io::Error::last_os_error()).map(|()| None),
        }
    }

    /// Gives a frame with its header, in pieces; false when the host has no room for it now.
    ///
    /// # Safety
    /// Every piece is valid for reads for its length. Others may write to it meanwhile.
    ///
    /// # Errors
    /// The host's error, as for a frame that makes no sense; [`is_gone`] tells whether the
    /// interface is gone.
    pub unsafe fn write(&self, pieces: &[libc::iovec]) -> io::Result<bool> {
        let count = libc::c_int::try_from(pieces.len()).unwrap_or(libc::c_int::MAX);
        // SAFETY: as the caller vouches for.
        let put = unsafe { libc::writev(self.file.as_raw_fd(), pieces.as_ptr(), count) };
        match put {
            -1 => not_now(io::Error::last_os_error()).map(|()| false),
            _ => Ok(true),
        }
    }
}

fn not_now(e: io::Error) -> io::Result<()> {
    match e.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(()),
        _ => Err(e),
    }
}

/// Whether an error says that the interface was removed.
#[must_use]
pub fn is_gone(e: &io::Error) -> bool {
    e.raw_os_error() == Some(libc::EBADFD)
}

/// Why the kernel does not give an interface.
fn refused(e: io::Error) -> Error {
    let told = |kind, reason: &'static str, hint: &'static str| Error::new(kind, reason).hint(hint);
    match e.raw_os_error() {
        Some(libc::EBUSY) => told(
            Kind::InUse,
            "somebody has it already",
            "each machine needs one of its own; `offshoot vm ls --json` tells who has which",
        ),
        Some(libc::EPERM) => told(
            Kind::ReadOnly,
            "this user may not open it",
            "make it for the user that forkd runs as: `ip tuntap add … mode tap user NAME`",
        ),
        Some(libc::EINVAL) => told(
            Kind::Invalid,
            "it is no tap interface, or one with several queues",
            "make one: `ip tuntap add dev NAME mode tap`",
        ),
        _ => return e.into(),
    }
    .caused_by(e)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_interfaces() {
        for name in ["tap0", "a", "vm-web_1.x", "123456789012345"] {
            assert!(check_name(name).is_ok(), "{name}");
        }
        for name in ["", "1234567890123456", "a b", "a/b", "tap%d", "tap-{name}", "a:1", "\u{e4}"] {
            assert_eq!(check_name(name).unwrap_err().kind(), Kind::Invalid, "{name}");
        }
    }

    #[test]
    fn an_interface_that_is_not_there_is_told_and_not_made() {
        let error = Tap::open("offno-such-if").unwrap_err();
        assert_eq!(error.kind(), Kind::NotFound);
        assert!(error.to_string().contains("offno-such-if"), "{error}");
        assert!(!std::path::Path::new("/sys/class/net/offno-such-if").exists());
    }
}
