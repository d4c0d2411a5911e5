//! GGUF files: what is read from sound ones, and what is said about unsound ones.

#[path = "support/gguf_sample.rs"]
mod gguf_sample;
#[path = "support/gguf_writer.rs"]
mod gguf_writer;

use std::path::{Path, PathBuf};

use airstream::Error;
use airstream::error::Kind;
use airstream::format::gguf::Gguf;
use airstream::format::quant::QuantType;
use gguf_sample::sample;
use gguf_writer::{GgufWriter, array};

/// Opens a file with these bytes.
fn open(bytes: &[u8]) -> Result<Gguf, Error> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    std::fs::write(&path, bytes).unwrap();
    Gguf::open(&path)
}

/// The error of a file that must not open, which names the file and says all of `parts`.
#[track_caller]
fn refused(bytes: &[u8], parts: &[&str]) -> Error {
    let error = open(bytes).err().expect("the file must be refused");
    says(&error, &["model.gguf"]);
    says(&error, parts);
    error
}

#[track_caller]
fn says(error: &Error, parts: &[&str]) {
    let text = error.to_string();
    for part in parts {
        assert!(text.contains(part), "{part:?} is not in: {text}");
    }
    assert!(!error.remedy().is_empty());
}

/// The sample with a change.
fn changed(change: impl FnOnce(&mut GgufWriter)) -> Vec<u8> {
    let mut file = sample();
    change(&mut file);
    file.to_bytes()
}

#[test]
fn both_versions_read_alike() {
    for version in [2, 3] {
        let gguf = open(&changed(|f| f.version = version)).unwrap();
        assert_eq!(gguf.version(), version);
        assert_eq!(gguf.str("general.architecture").unwrap(), Some("llama"));
        assert_eq!(gguf.tensors().len(), 4);
    }
}

#[test]
fn scalars_are_read_as_any_type_that_fits() {
    let gguf = open(&sample().to_bytes()).unwrap();
    for (key, value) in [
        ("u8", 200),
        ("u16", 60_000),
        ("u32", 7),
        ("i32", 70_000),
        ("i64", 42),
    ] {
        assert_eq!(gguf.u32(&format!("a.{key}")).unwrap(), Some(value), "{key}");
    }
    assert_eq!(gguf.f32("a.f32").unwrap(), Some(1e-5));
    assert_eq!(gguf.f32("a.f64").unwrap(), Some(0.25));
    assert_eq!(gguf.bool("a.bool").unwrap(), Some(true));
    assert_eq!(gguf.u32("absent").unwrap(), None);
    assert!(gguf.array("absent").unwrap().is_none());
}

#[test]
fn a_value_of_another_type_is_an_error_that_names_key_and_types() {
    let gguf = open(&sample().to_bytes()).unwrap();
    says(
        &gguf.u32("a.i8").unwrap_err(),
        &["\"a.i8\"", "uint32", "int8", "-3"],
    );
    says(
        &gguf.u32("a.u64").unwrap_err(),
        &["\"a.u64\"", "uint32", "uint64"],
    );
    says(&gguf.u32("a.f32").unwrap_err(), &["uint32", "float32"]);
    says(&gguf.f32("a.u32").unwrap_err(), &["float32", "uint32"]);
    says(&gguf.str("v.tokens").unwrap_err(), &["string", "array"]);
    says(&gguf.str("a.bytes").unwrap_err(), &["\"a.bytes\"", "UTF-8"]);
    says(&gguf.array("a.bool").err().unwrap(), &["array", "bool"]);
    let tokens = gguf.array("v.tokens").unwrap().unwrap();
    says(
        &tokens.u32s().err().unwrap(),
        &["\"v.tokens\"", "array of integer", "array of string"],
    );
    let negative = gguf.array("v.negative").unwrap().unwrap();
    says(&negative.u32s().err().unwrap(), &["\"v.negative\"", "-1"]);
    assert!(negative.f32s().is_err() && negative.strings().is_err());
}

#[test]
fn arrays_are_views() {
    let gguf = open(&sample().to_bytes()).unwrap();
    let array = |key| gguf.array(key).unwrap().unwrap();
    let tokens: Vec<&[u8]> = array("v.tokens").strings().unwrap().collect();
    assert_eq!(tokens, [&b"<s>"[..], b"", b"llo"]);
    assert_eq!(
        array("v.types").u32s().unwrap().collect::<Vec<_>>(),
        [1, 3, 6]
    );
    assert_eq!(
        array("v.scores").f32s().unwrap().collect::<Vec<_>>(),
        [0.0, -1.5, 2.0]
    );
    assert_eq!(
        array("v.bools").bools().unwrap().collect::<Vec<_>>(),
        [false, true]
    );
    assert_eq!(array("v.nested").len(), 2);
}

#[test]
fn keys_come_in_the_order_of_the_file_and_print_on_a_line() {
    let gguf = open(&changed(|f| f.str("long", &"é\n".repeat(9000)))).unwrap();
    let lines: Vec<String> = gguf
        .keys()
        .map(|(key, value)| format!("{key} = {value}"))
        .collect();
    assert_eq!(lines[0], "general.architecture = \"llama\"");
    assert_eq!(lines[2], "a.f32 = 1e-5");
    assert!(lines.contains(&"v.tokens = [string; 3]".to_owned()));
    let last = lines.last().unwrap();
    assert!(
        last.ends_with("...") && last.len() < 250 && !last.contains('\n'),
        "{last}"
    );
}

#[test]
fn tensors_have_shape_and_absolute_place() {
    let file = sample();
    let bytes = file.to_bytes();
    let gguf = open(&bytes).unwrap();
    assert_eq!(gguf.opened().len(), 1);
    assert_eq!(gguf.opened()[0].metadata.len(), bytes.len() as u64);
    let cube = gguf.tensor("cube").unwrap();
    assert_eq!((cube.cols, cube.rows, cube.dims), (32, 6, [32, 2, 3, 1]));
    assert_eq!(
        (cube.qtype, cube.bytes, cube.row_bytes()),
        (QuantType::Q8_0, 204, 34)
    );
    assert_eq!(&bytes[cube.offset as usize..][..204], [2; 204]);
    let last = gguf.tensor("last").unwrap();
    assert_eq!(last.offset + last.bytes, bytes.len() as u64);
    assert!(gguf.tensor("absent").is_none());
}

#[test]
fn the_alignment_is_the_files_own() {
    let aligned = |alignment: u32, written: usize| {
        let mut file = GgufWriter {
            alignment: written,
            ..GgufWriter::new()
        };
        file.u32("general.alignment", alignment);
        file.tensor("a", &[3], QuantType::F32, vec![1; 12]);
        file.tensor("b", &[3], QuantType::F32, vec![2; 12]);
        file.to_bytes()
    };
    for alignment in [8, 64, 4096] {
        let gguf = open(&aligned(alignment, alignment as usize)).unwrap();
        assert!(
            gguf.tensor("b")
                .unwrap()
                .offset
                .is_multiple_of(alignment.into())
        );
    }
    refused(
        &aligned(24, 8),
        &["general.alignment", "24", "power of two"],
    );
    refused(&aligned(0, 8), &["general.alignment"]);
    refused(&aligned(64, 32), &["tensor b", "aligned to 64"]);
    let text = changed(|f| f.str("general.alignment", "32"));
    refused(&text, &["general.alignment", "uint32", "string"]);
}

#[test]
fn files_of_another_kind_are_refused() {
    refused(b"", &["empty"]);
    refused(b"PK\x03\x04 a zip archive", &["not a GGUF file", "PK"]);
    let v1 = refused(&changed(|f| f.version = 1), &["version 1", "2 and 3"]);
    assert_eq!(v1.kind(), Kind::Unsupported);
    let swapped = refused(&changed(|f| f.version = 3u32.swap_bytes()), &["big-endian"]);
    assert_eq!(swapped.kind(), Kind::Unsupported);
    assert_eq!(
        Gguf::open(Path::new("/")).err().unwrap().kind(),
        Kind::Usage
    );
    assert_eq!(
        Gguf::open(Path::new("/no/such/file")).err().unwrap().kind(),
        Kind::Io
    );
}

#[test]
fn unknown_tensor_types_are_named() {
    let mxfp4 = refused(
        &changed(|f| f.tensors[1].ggml_type = 39),
        &["tensor cube", "39", "MXFP4", "Q4_0", "Q6_K", "BF16"],
    );
    assert_eq!(mxfp4.kind(), Kind::Unsupported);
    refused(
        &changed(|f| f.tensors[1].ggml_type = 4),
        &["tensor cube", "type 4", "retired"],
    );
    refused(
        &changed(|f| f.tensors[1].ggml_type = u32::MAX),
        &["tensor cube", "4294967295"],
    );
}

#[test]
fn impossible_shapes_are_refused() {
    refused(
        &changed(|f| f.tensors[0].dims = vec![8, 0]),
        &["tensor norm", "zero"],
    );
    refused(
        &changed(|f| f.tensors[0].dims = vec![]),
        &["tensor norm", "0 dimensions"],
    );
    refused(
        &changed(|f| f.tensors[0].dims = vec![1; 5]),
        &["tensor norm", "5 dimensions"],
    );
    refused(
        &changed(|f| f.tensors[1].dims = vec![48, 4]),
        &["tensor cube", "48", "32 in a Q8_0 block"],
    );
    for dims in [[1 << 63, 2], [1 << 62, 1 << 62], [1 << 61, 1]] {
        refused(
            &changed(|f| f.tensors[0].dims = dims.to_vec()),
            &["tensor norm"],
        );
    }
    refused(
        &changed(|f| f.tensors[0].name = "n".repeat(65)),
        &["tensor 0", "65 bytes"],
    );
    refused(
        &changed(|f| f.tensors[0].name = String::new()),
        &["tensor 0", "0 bytes"],
    );
}

#[test]
fn impossible_places_are_refused() {
    refused(
        &changed(|f| f.tensors[1].offset += 1),
        &["tensor cube", "aligned"],
    );
    refused(
        &changed(|f| f.tensors[1].offset = 0),
        &["overlap", "norm", "cube"],
    );
    refused(
        &changed(|f| f.tensors[3].offset = 256),
        &["overlap", "wide", "last"],
    );
    refused(
        &changed(|f| f.tensors[1].offset = 1 << 40),
        &["tensor cube", "204 of the 204 bytes"],
    );
    refused(
        &changed(|f| f.tensors[1].offset = u64::MAX - 31),
        &["tensor cube", "impossible"],
    );
}

#[test]
fn a_file_cut_inside_a_tensor_names_it_and_the_missing_bytes() {
    let whole = sample().to_bytes();
    let error = refused(
        &whole[..whole.len() - 5],
        &["truncated", "5 of the 72 bytes of tensor last"],
    );
    assert!(error.remedy().contains("download"));
    assert_eq!(error.kind(), Kind::Format);
}

#[test]
fn what_becomes_of_the_file_afterwards_changes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    // More than the first piece that is read.
    let long = "long ".repeat(1 << 20);
    std::fs::write(&path, changed(|f| f.str("last.key", &long))).unwrap();
    let gguf = Gguf::open(&path).unwrap();
    for change in ["", "short"] {
        std::fs::write(&path, change).unwrap();
        assert_eq!(gguf.str("last.key").unwrap(), Some(&long[..]));
        assert_eq!(gguf.str("general.architecture").unwrap(), Some("llama"));
        assert!(gguf.keys().count() > 2);
    }
}

#[test]
fn names_occur_once() {
    refused(&changed(|f| f.u32("a.u8", 1)), &["\"a.u8\"", "twice"]);
    refused(
        &changed(|f| f.tensors[1].name = "norm".to_owned()),
        &["norm", "twice"],
    );
    refused(&changed(|f| f.u32("", 1)), &["0 bytes"]);
}

#[test]
fn damaged_values_are_refused() {
    refused(
        &changed(|f| f.entry("k", 13, &[0])),
        &["\"k\"", "value type 13"],
    );
    refused(&changed(|f| f.entry("k", 7, &[2])), &["\"k\"", "bool"]);
    refused(
        &changed(|f| f.entry("k", 9, &array(7, 2, &[1, 9]))),
        &["\"k\"", "bool"],
    );
    let deep = (0..20).fold(array(0, 0, &[]), |inner, _| array(9, 1, &inner));
    refused(&changed(|f| f.entry("k", 9, &deep)), &["\"k\"", "deep"]);
}

/// Writes a model of three parts, with two tensors, one, and one; returns the parts' paths.
fn split_model(folder: &Path, change: impl Fn(usize, &mut GgufWriter)) -> Vec<PathBuf> {
    let whole = sample();
    let mut paths = Vec::new();
    for (i, tensors) in [0..2, 2..3, 3..4].into_iter().enumerate() {
        let mut part = GgufWriter::new();
        if i == 0 {
            part.entries = whole.entries.clone();
        }
        part.entry("split.no", 2, &(i as u16).to_le_bytes());
        part.entry("split.count", 2, &3u16.to_le_bytes());
        part.entry("split.tensors.count", 5, &4i32.to_le_bytes());
        for t in &whole.tensors[tensors] {
            let qtype = QuantType::from_ggml(t.ggml_type).unwrap();
            part.tensor(&t.name, &t.dims, qtype, t.data.clone());
        }
        change(i, &mut part);
        let path = folder.join(format!("model.gguf-{:05}-of-00003.gguf", i + 1));
        std::fs::write(&path, part.to_bytes()).unwrap();
        paths.push(path);
    }
    paths
}

#[test]
fn any_part_opens_a_split_model() {
    let folder = tempfile::tempdir().unwrap();
    let paths = split_model(folder.path(), |_, _| ());
    for path in &paths {
        let gguf = Gguf::open(path).unwrap();
        assert_eq!(gguf.files(), paths);
        assert_eq!(gguf.str("general.architecture").unwrap(), Some("llama"));
        for (name, file, fill) in [
            ("norm", 0, 1),
            ("cube", 0, 2),
            ("wide", 1, 3),
            ("last", 2, 4),
        ] {
            let tensor = gguf.tensor(name).unwrap();
            assert_eq!(tensor.file, file, "{name}");
            let bytes = std::fs::read(&gguf.files()[file]).unwrap();
            assert_eq!(gguf.opened()[file].metadata.len(), bytes.len() as u64);
            let data = &bytes[tensor.offset as usize..][..tensor.bytes as usize];
            assert!(data.iter().all(|&b| b == fill), "{name}");
        }
    }
}

#[test]
fn parts_that_do_not_belong_together_are_refused() {
    let refused = |change: &dyn Fn(usize, &mut GgufWriter), parts: &[&str]| {
        let folder = tempfile::tempdir().unwrap();
        let paths = split_model(folder.path(), change);
        says(&Gguf::open(&paths[0]).err().unwrap(), parts);
    };
    // The split entries are the last three.
    let split = |f: &mut GgufWriter, entry: usize, value: u16| {
        let at = f.entries.len() - 3 + entry;
        f.entries[at].2[..2].copy_from_slice(&value.to_le_bytes());
    };
    refused(
        &|i, f| split(f, 0, if i == 1 { 2 } else { i as u16 }),
        &["00002-of", "not part 2 of 3"],
    );
    refused(
        &|i, f| split(f, 1, if i == 1 { 4 } else { 3 }),
        &["00002-of", "not part 2 of 3"],
    );
    refused(
        &|_, f| split(f, 1, 5),
        &["part 1 of 5", "-00001-of-00005.gguf"],
    );
    refused(
        &|_, f| split(f, 2, 9),
        &["4 tensors", "split.tensors.count is 9"],
    );
    refused(
        &|i, f| f.tensors[0].name = if i == 0 { "x" } else { "y" }.into(),
        &["y occurs twice"],
    );
    refused(
        &|_, f| drop(f.entries.remove(f.entries.len() - 3)),
        &["no split.no"],
    );
}

#[test]
fn a_missing_or_renamed_part_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let paths = split_model(folder.path(), |_, _| ());
    let renamed = folder.path().join("other.gguf");
    std::fs::copy(&paths[1], &renamed).unwrap();
    says(
        &Gguf::open(&renamed).err().unwrap(),
        &["other.gguf", "part 2 of 3", "names"],
    );
    std::fs::remove_file(&paths[1]).unwrap();
    let error = Gguf::open(&paths[2]).err().unwrap();
    says(
        &error,
        &[
            "part 2 of 3",
            "missing",
            "-00002-of-00003.gguf",
            "all 3 parts",
        ],
    );
}
