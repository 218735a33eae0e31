package convert

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"slices"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"lazuli/fs/remote"
)

// build makes the manifest or index that n becomes, and brings all below it to DST, but not itself.
// What nothing changed in goes over as the bytes that it was.
func (c *conversion) build(ctx context.Context, n *node) (v1.Descriptor, []byte, error) {
	var raw []byte
	var err error
	typ := n.desc.MediaType
	switch {
	case n.children != nil:
		typ = types.OCIImageIndex
		raw, err = c.buildIndex(ctx, n)
	case n.config != nil:
		typ = types.OCIManifestSchema1
		raw, err = c.buildImage(ctx, n)
	}
	if err != nil {
		return v1.Descriptor{}, nil, fmt.Errorf("manifest %v: %w", n.desc.Digest, err)
	}
	if raw == nil {
		n.out = v1.Descriptor{MediaType: n.desc.MediaType, Digest: n.desc.Digest, Size: int64(len(n.raw))}
		return n.out, n.raw, nil
	}
	n.out = v1.Descriptor{MediaType: typ, Digest: sum(raw), Size: int64(len(raw))}
	return n.out, raw, nil
}

// buildImage returns the manifest of an image with its layers replaced, or nil if all were kept.
func (c *conversion) buildImage(ctx context.Context, n *node) ([]byte, error) {
	m, err := parseObject(n.raw)
	if err != nil {
		return nil, err
	}
	var layers []object
	if err := json.Unmarshal(m["layers"], &layers); err != nil {
		return nil, fmt.Errorf("layers: %w", err)
	}
	var was v1.Descriptor
	if err := json.Unmarshal(m["config"], &was); err != nil {
		return nil, fmt.Errorf("config: %w", err)
	}
	diffIDs := make([]v1.Hash, len(layers))
	changed, replaced := false, false
	for i, l := range layers {
		t := c.layers[n.layers[i].Digest]
		if t == nil || t.desc.MediaType != n.layers[i].MediaType && isTar(t.desc.MediaType) != isTar(n.layers[i].MediaType) {
			return nil, fmt.Errorf("layer %v: named with two media types", n.layers[i].Digest)
		}
		diffIDs[i] = t.diffID
		switch {
		case t.outcome == Converted || t.outcome == Reused:
			changed, replaced = true, true
			l.set("mediaType", t.to.MediaType)
			l.set("digest", t.to.Digest)
			l.set("size", t.to.Size)
			delete(l, "data")
			delete(l, "urls")
			fallthrough
		case len(t.to.Annotations) > 0 && t.outcome == Kept:
			changed = true
			if err := l.annotate(t.to.Annotations); err != nil {
				return nil, fmt.Errorf("layer %v: annotations: %w", n.layers[i].Digest, err)
			}
		}
	}
	config := n.config
	if changed {
		if config, err = c.buildConfig(ctx, n, m, layers, was, diffIDs); err != nil {
			return nil, err
		}
	} else if err := c.copyBlob(ctx, c.src, was, func(int) {}); err != nil {
		return nil, fmt.Errorf("config: %w", err)
	}
	n.lazy, n.config = nil, config
	for i, l := range n.layers {
		n.lazy = append(n.lazy, c.layers[l.Digest].lazy(n.layers[i]))
	}
	named, err := c.namePack(ctx, n, m, replaced)
	if err != nil || !changed && !named {
		return nil, err // nothing changed: not even the media types of docker
	}
	return m.bytes()
}

// buildConfig puts the image's config, with its layers' new diffIDs, to DST, and the layers and it into manifest m.
func (c *conversion) buildConfig(ctx context.Context, n *node, m object, layers []object, was v1.Descriptor, diffIDs []v1.Hash) ([]byte, error) {
	// Annotations of layers are OCI's, so all of the image has to be.
	for i, l := range layers {
		if to, ok := ociTypes[n.layers[i].MediaType]; ok && !isReplaced(c.layers[n.layers[i].Digest]) {
			l.set("mediaType", to)
		}
	}
	config, err := withDiffIDs(n.config, diffIDs)
	if err != nil {
		return nil, fmt.Errorf("config %v: %w", was.Digest, err)
	}
	to := v1.Descriptor{MediaType: types.OCIConfigJSON, Digest: sum(config), Size: int64(len(config))}
	if err := c.dst.put(ctx, to, bytesOf(config)); err != nil {
		return nil, fmt.Errorf("config: %w", err)
	}
	co, err := parseObject(m["config"])
	if err != nil {
		return nil, err
	}
	co.set("mediaType", to.MediaType)
	co.set("digest", to.Digest)
	co.set("size", to.Size)
	delete(co, "data")
	m.set("config", co)
	m.set("layers", layers)
	m.set("mediaType", types.OCIManifestSchema1)
	return config, nil
}

// lazy returns the descriptor of what a layer became, with the annotations that say where its table of contents is.
func (t *layerTask) lazy(was v1.Descriptor) v1.Descriptor {
	d := t.to
	d.Annotations = maps.Clone(was.Annotations)
	if d.Annotations == nil {
		d.Annotations = map[string]string{}
	}
	maps.Copy(d.Annotations, t.to.Annotations)
	return d
}

func isReplaced(t *layerTask) bool { return t.outcome == Converted || t.outcome == Reused }

// ociTypes are OCI's names for docker's types of blobs that are not rewritten.
var ociTypes = map[types.MediaType]types.MediaType{
	types.DockerLayer:             types.OCILayer,
	types.DockerUncompressedLayer: types.OCIUncompressedLayer,
	dockerZstdLayer:               types.OCILayerZStd,
	types.DockerForeignLayer:      types.OCIRestrictedLayer,
}

// withDiffIDs returns a config with the diffIDs replaced that are not zero, and nothing else changed.
func withDiffIDs(raw []byte, ids []v1.Hash) ([]byte, error) {
	config, err := parseObject(raw)
	if err != nil {
		return nil, err
	}
	rootfs, err := parseObject(config["rootfs"])
	if err != nil {
		return nil, fmt.Errorf("rootfs: %w", err)
	}
	var was []v1.Hash
	if err := json.Unmarshal(rootfs["diff_ids"], &was); err != nil {
		return nil, fmt.Errorf("rootfs.diff_ids: %w", err)
	}
	if len(was) != len(ids) {
		return nil, fmt.Errorf("%d diffIDs for %d layers", len(was), len(ids))
	}
	for i, id := range ids {
		if id != (v1.Hash{}) {
			was[i] = id
		}
	}
	rootfs.set("diff_ids", was)
	config.set("rootfs", rootfs)
	return config.bytes()
}

// buildIndex returns the index with its entries replaced, or nil if nothing below it changed.
func (c *conversion) buildIndex(ctx context.Context, n *node) ([]byte, error) {
	index, err := parseObject(n.raw)
	if err != nil {
		return nil, err
	}
	var list []object
	if err := json.Unmarshal(index["manifests"], &list); err != nil {
		return nil, fmt.Errorf("manifests: %w", err)
	}
	changed := false
	became := map[string]string{} // digests
	for i, child := range n.children {
		if child == nil {
			changed, list[i] = true, nil
			continue
		}
		desc, raw, err := c.build(ctx, child)
		if err != nil {
			return nil, err
		}
		if err := c.dst.putManifest(ctx, desc, raw); err != nil {
			return nil, fmt.Errorf("manifest %v: %w", desc.Digest, err)
		}
		if desc.Digest == child.desc.Digest {
			continue
		}
		changed = true
		became[child.desc.Digest.String()] = desc.Digest.String()
		list[i].set("mediaType", desc.MediaType)
		list[i].set("digest", desc.Digest)
		list[i].set("size", desc.Size)
		delete(list[i], "data")
	}
	if !changed {
		return nil, nil
	}
	list = slices.DeleteFunc(list, func(o object) bool { return o == nil })
	// An attestation goes over as it is: what it says is of the original. But the index ties it to an
	// image by that image's digest, and that must be one that is in the index.
	for _, entry := range list {
		var notes map[string]string
		if raw, ok := entry["annotations"]; !ok || json.Unmarshal(raw, &notes) != nil {
			continue
		}
		if to, ok := became[notes[attestationDigest]]; ok {
			if err := entry.annotate(map[string]string{attestationDigest: to}); err != nil {
				return nil, err
			}
		}
	}
	index.set("manifests", list)
	index.set("mediaType", types.OCIImageIndex)
	return index.bytes()
}

// finish brings the root to DST, unless DST's tag names it already.
func (c *conversion) finish(ctx context.Context, dst remote.Reference, desc v1.Descriptor, raw []byte) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if dst.Kind() == remote.Archive {
		if have, err := remote.Open(ctx, dst, c.opts.Remote); err == nil {
			d, _, err := have.Root(ctx)
			have.Close()
			if err == nil && d.Digest == desc.Digest {
				return nil
			}
		}
	}
	if err := c.dst.finish(ctx, desc, raw); err != nil {
		return fmt.Errorf("%v: %w", dst, err)
	}
	return nil
}

func bytesOf(b []byte) func() (io.ReadCloser, error) {
	return func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b)), nil }
}
