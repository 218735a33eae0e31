package remote

import (
	"context"
	"encoding/json"
	"fmt"
	"runtime"
	"slices"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// An Image is one image of a [Source], for one platform. It does not change.
type Image struct {
	Digest      v1.Hash      // of RawManifest
	Manifest    *v1.Manifest // parsed, its digests and sizes well-formed
	RawManifest []byte
	// Layers are in the manifest's order: the lowest first.
	Layers []Layer
	// Platform is what the index says the image is for. It is zero when the reference
	// names the manifest itself; then only the config knows.
	Platform v1.Platform

	src Source
}

// A Layer is one layer of an [Image] and where its bytes are.
type Layer struct {
	v1.Descriptor
	Blob Blob
}

// Bounds of an index of indexes: how deep, and how many manifests are asked for.
const (
	maxIndexDepth = 3
	maxIndexes    = 16
)

// Pick returns the image for a platform. If src's root is an index, that is the entry
// that fits best, looked for in nested indexes too; attestations are no images. If the root is an image, it is
// that one, whatever its platform.
//
// A nil platform is this machine's. An empty Variant takes the entry without a
// variant before others. If nothing fits, the error lists what there is.
func Pick(ctx context.Context, src Source, platform *v1.Platform) (*Image, error) {
	desc, raw, err := src.Root(ctx)
	if err != nil {
		return nil, err
	}
	if desc.MediaType.IsImage() {
		return newImage(src, desc, raw)
	}
	want := v1.Platform{OS: "linux", Architecture: runtime.GOARCH}
	if platform != nil {
		want = *platform
	}
	p := picker{src: src, want: want}
	if err := p.walk(ctx, raw, 0); err != nil {
		return nil, err
	}
	if p.found == nil {
		there := "nothing that runs"
		if len(p.there) > 0 {
			there = strings.Join(p.there, ", ")
		}
		return nil, fmt.Errorf("index %v: no image for %v: there is %s; choose one with --platform", desc.Digest, want, there)
	}
	img, err := ReadImage(ctx, src, *p.found)
	if err != nil {
		return nil, err
	}
	if p.found.Platform != nil {
		img.Platform = *p.found.Platform
	}
	return img, nil
}

// ReadImage returns the image whose manifest desc names.
func ReadImage(ctx context.Context, src Source, desc v1.Descriptor) (*Image, error) {
	raw, err := src.Manifest(ctx, desc)
	if err != nil {
		return nil, err
	}
	return newImage(src, desc, raw)
}

type picker struct {
	src   Source
	want  v1.Platform
	read  int // indexes read
	there []string
	found *v1.Descriptor
	rank  int // of found
}

func (p *picker) walk(ctx context.Context, raw []byte, depth int) error {
	index := new(v1.IndexManifest)
	if err := json.Unmarshal(raw, index); err != nil {
		return fmt.Errorf("index %v: %w", sum(raw), err)
	}
	images := slices.DeleteFunc(index.Manifests, func(d v1.Descriptor) bool { return !isImage(d) && !d.MediaType.IsIndex() })
	for _, d := range images {
		if d.MediaType.IsIndex() {
			if p.read++; p.read > maxIndexes || depth == maxIndexDepth {
				return fmt.Errorf("index %v: too many indexes within indexes", d.Digest)
			}
			raw, err := p.src.Manifest(ctx, d)
			if err != nil {
				return err
			}
			if err := p.walk(ctx, raw, depth+1); err != nil {
				return err
			}
			continue
		}
		rank := 0
		if d.Platform == nil {
			// An index of one image need not say for which platform that is.
			if len(images) == 1 && depth == 0 {
				rank = 1
			}
		} else {
			rank = fit(*d.Platform, p.want)
			if s := d.Platform.String(); len(p.there) < maxListed && !slices.Contains(p.there, s) {
				p.there = append(p.there, clean(s))
			}
		}
		if rank > p.rank {
			p.found, p.rank = &d, rank
		}
	}
	return nil
}

// isImage reports whether an entry of an index is an image and not what is stored beside
// images: attestations, signatures and other artifacts.
func isImage(d v1.Descriptor) bool {
	if d.Annotations["vnd.docker.reference.type"] == "attestation-manifest" {
		return false
	}
	// Some writers give an image's entry the type of its config.
	if d.ArtifactType != "" && !types.MediaType(d.ArtifactType).IsConfig() {
		return false
	}
	if d.Platform != nil && d.Platform.OS == "unknown" && d.Platform.Architecture == "unknown" {
		return false
	}
	return d.MediaType.IsImage()
}

// usual is what an architecture's name means without a variant.
var usual = map[string]string{"amd64": "v1", "arm64": "v8", "arm": "v7"}

// fit returns how well have serves want: 0 not at all, more is better.
func fit(have, want v1.Platform) int {
	if have.OS != want.OS || have.Architecture != want.Architecture {
		return 0
	}
	if want.OSVersion != "" && have.OSVersion != want.OSVersion {
		return 0
	}
	for _, f := range want.OSFeatures {
		if !slices.Contains(have.OSFeatures, f) {
			return 0
		}
	}
	std := usual[have.Architecture]
	switch {
	case have.Variant == want.Variant:
		return 4
	case want.Variant == "" && have.Variant == std, want.Variant == std && have.Variant == "":
		return 3
	case want.Variant == "" && have.Architecture == "arm":
		// Another generation of arm may still run: v6 on v7.
		return 2
	}
	return 0
}

func newImage(src Source, desc v1.Descriptor, raw []byte) (*Image, error) {
	m := new(v1.Manifest)
	if err := json.Unmarshal(raw, m); err != nil {
		return nil, fmt.Errorf("manifest %v: %w", desc.Digest, err)
	}
	t, err := manifestType(raw, desc.MediaType)
	if err != nil {
		return nil, fmt.Errorf("manifest %v: %w", desc.Digest, err)
	}
	if !t.IsImage() {
		return nil, fmt.Errorf("manifest %v: an index, where an image's manifest was expected", desc.Digest)
	}
	img := &Image{Digest: desc.Digest, Manifest: m, RawManifest: raw, src: src}
	for i, d := range append([]v1.Descriptor{m.Config}, m.Layers...) {
		what := "config"
		if i > 0 {
			what = fmt.Sprintf("layer %d", i)
		}
		if err := checkHash(d.Digest); err != nil {
			return nil, fmt.Errorf("manifest %v: %s: digest %.100q: %w", desc.Digest, what, d.Digest, err)
		}
		if d.Size < 0 {
			return nil, fmt.Errorf("manifest %v: %s: a size of %d bytes", desc.Digest, what, d.Size)
		}
		if i > 0 {
			img.Layers = append(img.Layers, Layer{d, src.Blob(d)})
		}
	}
	return img, nil
}

// Config returns the image's config, parsed and as it came. It is read from the source with each
// call and checked against its digest.
func (img *Image) Config(ctx context.Context) (*v1.ConfigFile, []byte, error) {
	d := img.Manifest.Config
	// The first images of schema 2 had configs of no particular type.
	if !d.MediaType.IsConfig() && d.MediaType != "application/octet-stream" {
		return nil, nil, fmt.Errorf("manifest %v: its config is of type %.80q: an artifact, not an image that can be run", img.Digest, d.MediaType)
	}
	raw, err := ReadBlob(ctx, img.src, d, maxConfig)
	if err != nil {
		return nil, nil, fmt.Errorf("config: %w", err)
	}
	c, err := img.ParseConfig(raw)
	return c, raw, err
}

// ParseConfig returns the image's config out of bytes from anywhere, which are checked against its digest.
func (img *Image) ParseConfig(raw []byte) (*v1.ConfigFile, error) {
	d := img.Manifest.Config
	if err := verify("config", d.Digest, raw); err != nil {
		return nil, err
	}
	c := new(v1.ConfigFile)
	if err := json.Unmarshal(raw, c); err != nil {
		return nil, fmt.Errorf("config %v: %w", d.Digest, err)
	}
	return c, nil
}
