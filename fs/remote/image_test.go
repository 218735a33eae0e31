package remote

import (
	"errors"
	"strings"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

func platform(s string) *v1.Platform {
	p, err := v1.ParsePlatform(s)
	if err != nil {
		panic(err)
	}
	return p
}

// entries makes an index of one image per platform, each with one layer of another size, and
// returns the index and which digest is whose.
func (c *content) entries(platforms ...string) (v1.IndexManifest, map[v1.Hash]string) {
	index := v1.IndexManifest{SchemaVersion: 2, MediaType: types.OCIImageIndex}
	whose := make(map[v1.Hash]string)
	for i, p := range platforms {
		one := newContent(1, 10+i)
		for h, b := range one.blobs {
			c.blobs[h] = b
		}
		d := one.manifest
		d.Platform = platform(p)
		index.Manifests = append(index.Manifests, d)
		whose[d.Digest] = p
	}
	return index, whose
}

func TestPick(t *testing.T) {
	for _, tt := range []struct {
		there, want, picked string
	}{
		{"linux/arm64 linux/amd64", "linux/amd64", "linux/amd64"},
		{"linux/amd64/v3 linux/amd64", "linux/amd64", "linux/amd64"},
		{"linux/amd64 linux/amd64/v3", "linux/amd64/v3", "linux/amd64/v3"},
		{"linux/amd64/v3", "linux/amd64", ""},
		{"linux/arm64/v8", "linux/arm64", "linux/arm64/v8"},
		{"linux/arm64", "linux/arm64/v8", "linux/arm64"},
		{"linux/arm/v6 linux/arm/v7", "linux/arm", "linux/arm/v7"},
		{"linux/arm/v6", "linux/arm", "linux/arm/v6"},
		{"linux/arm/v7", "linux/arm/v6", ""},
		{"windows/amd64 unknown/unknown", "linux/amd64", ""},
		{"unknown/unknown", "unknown/unknown", ""},
		{"windows/amd64:10.1 windows/amd64:10.2", "windows/amd64:10.2", "windows/amd64:10.2"},
	} {
		c := newContent(0, 0)
		index, whose := c.entries(strings.Fields(tt.there)...)
		c.manifest = c.addJSON(types.OCIImageIndex, index)
		img, err := Pick(t.Context(), newFake(t, c).open(t, Options{}), platform(tt.want))
		if tt.picked == "" {
			wantError(t, err, "no image for "+tt.want, "--platform")
			if strings.Contains(tt.there, "windows") {
				wantError(t, err, "windows/amd64")
			}
			if strings.Contains(err.Error(), "there is unknown") {
				t.Errorf("error %v: an attestation is no platform", err)
			}
			continue
		}
		if err != nil {
			t.Errorf("%s from %s: %v", tt.want, tt.there, err)
			continue
		}
		if got := whose[img.Digest]; got != tt.picked || img.Platform.String() != tt.picked {
			t.Errorf("%s from %s: %s (%v), want %s", tt.want, tt.there, got, img.Platform, tt.picked)
		}
	}
}

func TestPickNested(t *testing.T) {
	c := newContent(0, 0)
	index, whose := c.entries("linux/amd64", "linux/arm64")
	for range maxIndexDepth {
		d := c.addJSON(types.OCIImageIndex, index)
		index = v1.IndexManifest{SchemaVersion: 2, MediaType: types.OCIImageIndex, Manifests: []v1.Descriptor{d}}
	}
	c.manifest = c.addJSON(types.OCIImageIndex, index)
	img, err := Pick(t.Context(), newFake(t, c).open(t, Options{}), platform("linux/arm64"))
	if err != nil || whose[img.Digest] != "linux/arm64" {
		t.Fatalf("%v, %v", img, err)
	}

	deeper := v1.IndexManifest{SchemaVersion: 2, MediaType: types.OCIImageIndex, Manifests: []v1.Descriptor{c.manifest}}
	c.manifest = c.addJSON(types.OCIImageIndex, deeper)
	_, err = Pick(t.Context(), newFake(t, c).open(t, Options{}), platform("linux/arm64"))
	wantError(t, err, "too many indexes")

	wide := v1.IndexManifest{SchemaVersion: 2, MediaType: types.OCIImageIndex}
	for i := range maxIndexes + 1 {
		empty := v1.IndexManifest{SchemaVersion: 2, MediaType: types.OCIImageIndex, Manifests: []v1.Descriptor{}, Annotations: map[string]string{"n": strings.Repeat("x", i)}}
		wide.Manifests = append(wide.Manifests, c.addJSON(types.OCIImageIndex, empty))
	}
	c.manifest = c.addJSON(types.OCIImageIndex, wide)
	f := newFake(t, c)
	_, err = Pick(t.Context(), f.open(t, Options{}), platform("linux/arm64"))
	wantError(t, err, "too many indexes")
	if n := len(f.requests()); n > 1+maxIndexes {
		t.Errorf("%d requests", n)
	}
}

// TestPickWithoutPlatform takes the one image of an index that does not say for what it is.
func TestPickWithoutPlatform(t *testing.T) {
	c := newContent(0, 0)
	index, _ := c.entries("linux/amd64", "unknown/unknown")
	index.Manifests[0].Platform = nil
	c.manifest = c.addJSON(types.OCIImageIndex, index)
	img, err := Pick(t.Context(), newFake(t, c).open(t, Options{}), platform("linux/amd64"))
	if err != nil || img.Digest != index.Manifests[0].Digest {
		t.Errorf("%v, %v", img, err)
	}
}

func TestBadManifests(t *testing.T) {
	digest := `"digest":"sha256:` + strings.Repeat("a", 64) + `"`
	for _, tt := range []struct{ manifest, want string }{
		{`{`, "not a manifest"},
		{`[]`, "not a manifest"},
		{`{}`, "either manifests, or config and layers"},
		{`{"schemaVersion":2,"manifests":[],"layers":[],"config":{}}`, "either manifests, or config and layers"},
		{`{"schemaVersion":1,"fsLayers":[]}`, "schema 1"},
		{`{"schemaVersion":2,"mediaType":"text/plain","layers":[]}`, `"text/plain"`},
		{`{"schemaVersion":2,"layers":[{"digest":"sha256:../../../../etc/passwd","size":1}]}`, "manifest"},
		{`{"schemaVersion":2,"config":{` + digest + `},"layers":[{"size":1}]}`, "layer 1: digest"},
		{`{"schemaVersion":2,"config":{"size":1},"layers":[]}`, "config: digest"},
		{`{"schemaVersion":2,"config":{` + digest + `},"layers":[{` + digest + `,"size":-1}]}`, "layer 1: a size of -1"},
		{`{"schemaVersion":2,"config":{` + digest + `},"layers":[{"digest":"sha512:` + strings.Repeat("a", 128) + `","size":1}]}`, "manifest"},
	} {
		c := newContent(0, 0)
		c.manifest = c.add(types.OCIManifestSchema1, []byte(tt.manifest))
		_, err := Pick(t.Context(), newFake(t, c).open(t, Options{}), nil)
		wantError(t, err, tt.want)
	}
}

func TestConfig(t *testing.T) {
	c := newContent(1, 10)
	m := v1.Manifest{SchemaVersion: 2, Config: c.addJSON("application/vnd.cncf.helm.config.v1+json", map[string]string{}), Layers: c.layers}
	c.manifest = c.addJSON(types.OCIManifestSchema1, m)
	f := newFake(t, c)
	img, err := Pick(t.Context(), f.open(t, Options{}), nil)
	if err != nil {
		t.Fatal(err)
	}
	_, _, err = img.Config(t.Context())
	wantError(t, err, "vnd.cncf.helm", "not an image")

	m.Config = c.add(types.OCIConfigJSON, []byte("{}"))
	delete(c.blobs, m.Config.Digest)
	c.manifest = c.addJSON(types.OCIManifestSchema1, m)
	if img, err = Pick(t.Context(), f.open(t, Options{}), nil); err != nil {
		t.Fatal(err)
	}
	_, _, err = img.Config(t.Context())
	wantError(t, err, "config: ", m.Config.Digest.String(), "not complete")
	if !errors.Is(err, ErrNotFound) {
		t.Errorf("%v is not ErrNotFound", err)
	}
}
