//! Images made by `qemu-img` and `qemu-io` are compared with what `qemu-img convert` makes of them.

mod bad;
mod read;
mod write;

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use format::{Error, Kind};
use tempfile::TempDir;

use super::*;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

/// A folder for images, or `None` (after saying so) on a machine without the tools.
fn bench() -> Option<Bench> {
    for tool in ["qemu-img", "qemu-io"] {
        if Command::new(tool).arg("--version").output().is_err() {
            eprintln!("SKIPPED: {tool} not found");
            return None;
        }
    }
    Some(Bench { dir: tempfile::tempdir().unwrap() })
}

struct Bench {
    dir: TempDir,
}

impl Bench {
    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Runs `qemu-img` with the words of `line` in the folder.
    fn img(&self, line: &str) {
        run(Command::new("qemu-img").args(line.split(' ')).current_dir(&self.dir));
    }

    /// Runs `qemu-io` commands on `image`.
    fn io(&self, image: &str, commands: &[&str]) {
        let mut io = Command::new("qemu-io");
        for command in commands {
            io.args(["-c", command]);
        }
        run(io.arg(image).current_dir(&self.dir));
    }

    /// A raw file of `size` bytes with data in every third MiB.
    fn raw(&self, name: &str, size: u64) -> PathBuf {
        let path = self.path(name);
        let file = File::create(&path).unwrap();
        file.set_len(size).unwrap();
        for at in (0..size).step_by(3 << 20) {
            let len = (300 * KIB + 512).min(size - at);
            file.write_all_at(&noise(at, len), at).unwrap();
        }
        path
    }

    /// What `qemu-img` reads from `image`.
    fn expected(&self, image: &str, format: Format) -> Vec<u8> {
        self.img(&format!("convert -f {format} -O raw {image} {image}.expected"));
        std::fs::read(self.path(&format!("{image}.expected"))).unwrap()
    }

    /// Opens `image`, found to be `format`, and holds all that the source says against
    /// [`Bench::expected`].
    fn verify(&self, image: &str, format: Format) -> Box<dyn Source> {
        let path = self.path(image);
        assert_eq!(detect(&path).unwrap(), format, "{image}");
        let source = open_source(&path, None).unwrap();
        let want = self.expected(image, format);
        assert_eq!(source.size(), want.len() as u64, "{image}");
        assert_eq!(source.format(), format);

        let mut at = 0;
        for (len, kind) in walk(source.as_ref()) {
            let end = at + len;
            let range = usize::try_from(at).unwrap()..usize::try_from(end).unwrap();
            if kind != RunKind::Data {
                assert!(want[range].iter().all(|b| *b == 0), "{image}: {kind:?} at {at}..{end}");
            }
            at = end;
        }
        assert_eq!(at, source.size(), "{image}");

        // Odd lengths, from four threads at once.
        std::thread::scope(|threads| {
            for first in 0..4 {
                let (source, want) = (&source, &want);
                threads.spawn(move || {
                    let part = 333 * 512 + 7;
                    for (i, want) in want.chunks(part).enumerate().filter(|(i, _)| i % 4 == first) {
                        let mut got = vec![0xee; want.len()];
                        source.read_at((i * part) as u64, &mut got).unwrap();
                        assert!(got == want, "{image} differs in part {i}");
                    }
                });
            }
        });
        source
    }
}

fn run(command: &mut Command) -> String {
    let out = command.output().unwrap();
    let text = [out.stdout, out.stderr].concat();
    let text = String::from_utf8_lossy(&text).into_owned();
    assert!(out.status.success(), "{command:?}: {text}");
    text
}

/// All runs of an image, lengths and kinds.
fn walk(source: &dyn Source) -> Vec<(u64, RunKind)> {
    let mut runs = Vec::new();
    let mut at = 0;
    while at < source.size() {
        let run = source.status(at, u64::MAX).unwrap();
        assert!(run.len > 0);
        runs.push((run.len, run.kind));
        at += run.len;
    }
    assert_eq!(at, source.size());
    runs
}

/// Bytes that do not compress and have no zero in them.
fn noise(seed: u64, len: u64) -> Vec<u8> {
    let mut state = seed ^ 0x9e37_79b9_7f4a_7c15;
    (0..len)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            state.to_le_bytes()[7] | 1
        })
        .collect()
}

fn patch(path: &Path, at: u64, bytes: &[u8]) {
    let file = File::options().write(true).open(path).unwrap();
    file.write_all_at(bytes, at).unwrap();
}

fn truncate(path: &Path, len: u64) {
    File::options().write(true).open(path).unwrap().set_len(len).unwrap();
}

/// Opens an image that must be refused.
fn refused(path: &Path) -> Error {
    match open_source(path, None) {
        Ok(_) => panic!("{} was opened", path.display()),
        Err(e) => e,
    }
}

/// Opens an image and reads all of it, run by run.
fn read_all(path: &Path, format: Option<Format>) -> Result<Vec<u8>> {
    let source = open_source(path, format)?;
    let mut all = Vec::new();
    while (all.len() as u64) < source.size() {
        let at = all.len();
        let run = source.status(at as u64, 64 * KIB)?;
        all.resize(at + usize::try_from(run.len).unwrap(), 0xee);
        source.read_at(at as u64, &mut all[at..])?;
    }
    Ok(all)
}

/// Takes the format of the backing file out of a version 3 image.
fn forget_backing_format(path: &Path, format: &str) {
    let image = std::fs::read(path).unwrap();
    let mut extension = 0xe279_2aca_u32.to_be_bytes().to_vec();
    extension.extend(u32::try_from(format.len()).unwrap().to_be_bytes());
    extension.extend(format.as_bytes());
    let at = image.windows(extension.len()).position(|w| w == extension).unwrap();
    // Readers pass over extensions that they do not know.
    patch(path, at as u64, b"none");
}

/// Asserts kind and words of an error, and that it names its object.
fn assert_error(e: &Error, kind: Kind, words: &str) {
    let text = e.to_string();
    assert_eq!(e.kind(), kind, "{text}");
    assert!(text.contains(words), "`{words}` is not in `{text}`");
    assert!(e.object().is_some(), "no object: {text}");
}
