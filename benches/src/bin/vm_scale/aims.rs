//! What was aimed at, and what came of it.

/// A bound that a figure is to keep.
#[derive(Debug, Clone, Copy)]
pub enum Bound {
    /// No more than this.
    Most(f64),
    /// No less than this.
    Least(f64),
}

/// Figures with their aims, in the order in which they were measured.
#[derive(Debug, Default)]
pub struct Aims(Vec<(String, f64, Bound)>);

impl Aims {
    /// Notes a figure.
    pub fn note(&mut self, what: impl Into<String>, value: f64, bound: Bound) {
        self.0.push((what.into(), value, bound));
    }

    /// Prints all of them.
    pub fn print(&self) {
        if self.0.is_empty() {
            return;
        }
        println!("\n### Aims\n\n| what | measured | aim | |\n|---|---|---|---|");
        for (what, value, bound) in &self.0 {
            let (met, aim) = match *bound {
                Bound::Most(most) => (*value <= most, format!("≤ {most}")),
                Bound::Least(least) => (*value >= least, format!("≥ {least}")),
            };
            let outcome = if met { "met" } else { "**missed**" };
            println!("| {what} | {value:.2} | {aim} | {outcome} |");
        }
    }
}
