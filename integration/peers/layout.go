package main

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// A layout is an OCI image layout on disk.
type layout string

// splitTag takes DIR:TAG apart. The tag may be missing; it cannot hold a slash.
func splitTag(s string) (dir layout, tag string) {
	if i := strings.LastIndexByte(s, ':'); i > strings.LastIndexByte(s, '/') {
		return layout(s[:i]), s[i+1:]
	}
	return layout(s), ""
}

func (l layout) blob(d digest.Digest) string {
	return filepath.Join(string(l), "blobs", d.Algorithm().String(), d.Encoded())
}

func (l layout) read(d digest.Digest, v any) error {
	b, err := os.ReadFile(l.blob(d))
	if err != nil {
		return err
	}
	if digest.FromBytes(b) != d {
		return fmt.Errorf("blob %s has another digest", d)
	}
	return json.Unmarshal(b, v)
}

// target returns what index.json names tag, or its first manifest if tag is "".
func (l layout) target(tag string) (ocispec.Descriptor, error) {
	var index ocispec.Index
	b, err := os.ReadFile(filepath.Join(string(l), ocispec.ImageIndexFile))
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	if err := json.Unmarshal(b, &index); err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("%s: index.json: %w", l, err)
	}
	for _, d := range index.Manifests {
		if tag == "" || d.Annotations[ocispec.AnnotationRefName] == tag {
			return d, nil
		}
	}
	return ocispec.Descriptor{}, fmt.Errorf("%s: no image %q", l, tag)
}

// manifest returns the image manifest that d is or, if d is an index, that it names first.
func (l layout) manifest(d ocispec.Descriptor) (m ocispec.Manifest, err error) {
	for images.IsIndexType(d.MediaType) {
		var index ocispec.Index
		if err := l.read(d.Digest, &index); err != nil {
			return m, err
		}
		if len(index.Manifests) == 0 {
			return m, fmt.Errorf("index %s is empty", d.Digest)
		}
		d = index.Manifests[0]
	}
	return m, l.read(d.Digest, &m)
}

// writeIndex makes desc the layout's only image, under the name latest.
func (l layout) writeIndex(desc ocispec.Descriptor) error {
	desc.Annotations = map[string]string{ocispec.AnnotationRefName: "latest"}
	index := ocispec.Index{MediaType: ocispec.MediaTypeImageIndex, Manifests: []ocispec.Descriptor{desc}}
	index.SchemaVersion = 2
	b, err := json.Marshal(index)
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(string(l), ocispec.ImageIndexFile), b, 0o644); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(string(l), ocispec.ImageLayoutFile), []byte(`{"imageLayoutVersion":"1.0.0"}`), 0o644)
}
