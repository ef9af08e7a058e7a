//! Progress of long verbs: a bar on standard error, when that is a terminal.

use std::io::IsTerminal as _;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use blockd::pump::Watch;
use format::Result;

use crate::output::Output;
use crate::signals;

/// A bar of bytes, or nothing at all.
pub struct Progress {
    bar: ProgressBar,
    visible: bool,
}

impl Progress {
    /// A bar for `verb`. Nothing is drawn for a quiet user or a standard error that is not a
    /// terminal.
    #[must_use]
    pub fn new(out: Output, verb: &'static str) -> Self {
        let visible = !out.quiet && std::io::stderr().is_terminal();
        let target =
            if visible { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
        let bar = ProgressBar::with_draw_target(Some(0), target);
        let shape = "{msg} {wide_bar} {bytes}/{total_bytes}  {bytes_per_sec}  {eta}";
        let style = ProgressStyle::with_template(shape);
        bar.set_style(style.expect("the shape is a constant and a test draws it"));
        bar.set_message(verb);
        if visible {
            bar.enable_steady_tick(Duration::from_millis(250));
        }
        Progress { bar, visible }
    }
}

impl Watch for Progress {
    fn wants_total(&self) -> bool {
        self.visible
    }

    fn expect(&self, bytes: u64) {
        self.bar.set_length(bytes);
    }

    fn add(&self, bytes: u64) {
        self.bar.inc(bytes);
    }

    fn set(&self, done: u64, total: u64) {
        self.bar.set_length(total);
        self.bar.set_position(done);
    }

    fn check(&self) -> Result<()> {
        signals::check()
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shape_of_the_bar_is_valid() {
        let progress = Progress::new(Output { json: false, quiet: true }, "test");
        progress.add(10);
        progress.set(20, 40);

        assert_eq!((progress.bar.position(), progress.bar.length()), (20, Some(40)));
    }
}
