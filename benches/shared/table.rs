//! What benches have in common: rows of figures, their medians, a table, and a file.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

/// One measurement, by the figures' names.
pub type Figures = BTreeMap<&'static str, f64>;

/// Measurements by row.
#[derive(Default)]
pub struct Table(BTreeMap<String, Vec<Figures>>);

impl Table {
    /// Adds one to a row.
    pub fn add(&mut self, name: &str, figures: Figures) {
        println!("  {name}: {figures:.2?}");
        self.0.entry(name.to_owned()).or_default().push(figures);
    }

    /// A figure of a row, each time that it was measured.
    pub fn values(&self, name: &str, figure: &str) -> Vec<f64> {
        self.0[name]
            .iter()
            .filter_map(|figures| figures.get(figure).copied())
            .collect()
    }

    /// The median of a figure of a row.
    pub fn median(&self, name: &str, figure: &str) -> f64 {
        median(self.values(name, figure))
    }

    /// Prints the medians, and writes them with all runs to `target/bench/<bench>.json`.
    pub fn print(&self, bench: &str) {
        let mut json = serde_json::Map::new();
        println!("\nmedians");
        for (name, runs) in &self.0 {
            let row: BTreeMap<&str, f64> = runs[0]
                .keys()
                .map(|figure| (*figure, self.median(name, figure)))
                .collect();
            let cells: Vec<String> = row
                .iter()
                .map(|(figure, value)| format!("{figure} {value:.2}"))
                .collect();
            println!("{name:<34} {}", cells.join("  "));
            json.insert(
                name.clone(),
                serde_json::json!({ "median": row, "runs": runs }),
            );
        }
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/bench");
        fs::create_dir_all(&folder).unwrap();
        fs::write(
            folder.join(format!("{bench}.json")),
            serde_json::to_string_pretty(&json).unwrap(),
        )
        .unwrap();
    }
}

/// The middle one; no number if there is none.
pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}
