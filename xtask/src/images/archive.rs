//! OCI archives: an image layout (OCI image specification, `image-layout.md`) in a tar file, as containerd, podman
//! and skopeo import it.

use std::{
    collections::HashMap,
    fs::File,
    io::{self, Read},
    path::{Path, PathBuf},
    str::FromStr,
};

use anyhow::{Context, Result};
use oci_spec::image::{
    ANNOTATION_REF_NAME, Arch, ConfigBuilder, Descriptor, DescriptorBuilder, ImageConfigurationBuilder,
    ImageIndexBuilder, ImageManifestBuilder, MediaType, Os, RootFsBuilder, SCHEMA_VERSION, Sha256Digest,
};
use sha2::{Digest, Sha256};
use tar::{Builder, Header};

use super::EPOCH;

/// The annotation under which containerd looks for the full name when it imports.
const CONTAINERD_NAME: &str = "io.containerd.image.name";

/// An image of one layer.
#[derive(Debug)]
pub(super) struct Image {
    /// Its full name, tag included.
    pub(super) name: String,
    /// The layer, an uncompressed tar file: it is read once or twice on this machine and never sent anywhere.
    pub(super) layer: PathBuf,
    /// What runs when a container names no command.
    pub(super) command: Vec<&'static str>,
}

impl Image {
    /// Writes the image as an OCI archive.
    ///
    /// # Errors
    /// When the layer can't be read or the archive can't be written.
    pub(super) fn write(&self, output: &Path) -> Result<()> {
        let mut archive = Builder::new(File::create(output)?);
        append(&mut archive, "oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#)?;

        let layer = self.append_layer(&mut archive)?;
        let config = self.config(&layer)?;
        let config = append_blob(&mut archive, MediaType::ImageConfig, config.as_bytes())?;
        let manifest = ImageManifestBuilder::default()
            .schema_version(SCHEMA_VERSION)
            .media_type(MediaType::ImageManifest)
            .config(config)
            .layers(vec![layer])
            .build()?
            .to_string()?;
        let mut manifest = append_blob(&mut archive, MediaType::ImageManifest, manifest.as_bytes())?;
        let tag = self.name.rsplit_once(':').map_or("latest", |(_, tag)| tag);
        manifest.set_annotations(Some(HashMap::from([
            (CONTAINERD_NAME.to_owned(), self.name.clone()),
            (ANNOTATION_REF_NAME.to_owned(), tag.to_owned()),
        ])));
        let index =
            ImageIndexBuilder::default().schema_version(SCHEMA_VERSION).manifests(vec![manifest]).build()?;
        append(&mut archive, "index.json", index.to_string()?.as_bytes())?;
        archive.into_inner()?;
        Ok(())
    }

    fn config(&self, layer: &Descriptor) -> Result<String> {
        let path = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
        let command = self.command.iter().map(ToString::to_string).collect::<Vec<_>>();
        let config = ConfigBuilder::default().cmd(command).env(vec![path.to_owned()]).build()?;
        // An uncompressed layer's own digest is its diff id.
        let diff_ids = vec![layer.digest().to_string()];
        let rootfs = RootFsBuilder::default().typ("layers").diff_ids(diff_ids).build()?;
        let configuration = ImageConfigurationBuilder::default()
            .architecture(Arch::Amd64)
            .os(Os::Linux)
            .config(config)
            .rootfs(rootfs)
            .build()?;
        Ok(configuration.to_string()?)
    }

    fn append_layer(&self, archive: &mut Builder<File>) -> Result<Descriptor> {
        let open = || File::open(&self.layer).with_context(|| format!("opening {}", self.layer.display()));
        let mut hash = Sha256::new();
        let size = io::copy(&mut open()?, &mut hash)?;
        let descriptor = descriptor(MediaType::ImageLayer, hash, size)?;
        append_from(archive, &blob_path(&descriptor), size, open()?)?;
        Ok(descriptor)
    }
}

fn append_blob(archive: &mut Builder<File>, media_type: MediaType, content: &[u8]) -> Result<Descriptor> {
    let descriptor = descriptor(media_type, Sha256::new_with_prefix(content), content.len().try_into()?)?;
    append(archive, &blob_path(&descriptor), content)?;
    Ok(descriptor)
}

fn descriptor(media_type: MediaType, hash: Sha256, size: u64) -> Result<Descriptor> {
    let digest = Sha256Digest::from_str(&format!("{:x}", hash.finalize()))?;
    Ok(DescriptorBuilder::default().media_type(media_type).digest(digest).size(size).build()?)
}

fn blob_path(descriptor: &Descriptor) -> String {
    format!("blobs/sha256/{}", descriptor.digest().digest())
}

fn append(archive: &mut Builder<File>, path: &str, content: &[u8]) -> Result<()> {
    append_from(archive, path, content.len().try_into()?, content)
}

fn append_from(archive: &mut Builder<File>, path: &str, size: u64, content: impl Read) -> Result<()> {
    let mut header = Header::new_gnu();
    header.set_mode(0o644);
    header.set_mtime(EPOCH);
    header.set_size(size);
    archive.append_data(&mut header, path, content).with_context(|| format!("adding {path}"))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use oci_spec::image::{ImageConfiguration, ImageIndex, ImageManifest};

    use super::super::layer::read_file;
    use super::*;

    #[test]
    fn every_digest_leads_to_what_it_names() -> Result<()> {
        let directory = tempfile::tempdir()?;
        let (layer, archive) = (directory.path().join("layer"), directory.path().join("image.tar"));
        fs::write(&layer, "not really a tar file")?;
        Image { name: "example.test/it:7".into(), layer, command: vec!["sh"] }.write(&archive)?;

        let blob = |descriptor: &Descriptor| -> Result<Vec<u8>> {
            let content = read_file(&archive, Path::new(&blob_path(descriptor)))?;
            assert_eq!(format!("{:x}", Sha256::digest(&content)), descriptor.digest().digest());
            assert_eq!(u64::try_from(content.len())?, descriptor.size());
            Ok(content)
        };
        let index = ImageIndex::from_reader(&*read_file(&archive, Path::new("index.json"))?)?;
        let [named] = index.manifests().as_slice() else { panic!("one manifest") };
        let names = named.annotations().as_ref().unwrap();
        assert_eq!(names[CONTAINERD_NAME], "example.test/it:7");
        assert_eq!(names[ANNOTATION_REF_NAME], "7");
        let manifest = ImageManifest::from_reader(&*blob(named)?)?;
        assert_eq!(blob(&manifest.layers()[0])?, b"not really a tar file");
        let config = ImageConfiguration::from_reader(&*blob(manifest.config())?)?;
        assert_eq!(config.rootfs().diff_ids()[0], manifest.layers()[0].digest().to_string());
        Ok(())
    }
}
