//! Products of matrices through cuBLAS: which algorithm, chosen once for each shape.

use std::collections::HashMap;
use std::ffi::c_void;

use cudarc::cublaslt::result::{self, CublasError};
use cudarc::cublaslt::sys::{
    self, cublasComputeType_t, cublasLtMatmulDescAttributes_t,
    cublasLtMatmulPreferenceAttributes_t, cudaDataType,
};
use cudarc::driver::result as driver;
use cudarc::driver::sys::CUstream;

use crate::Error;
use crate::cuda::device::{Address, Half, Product};

/// Memory that algorithms may use, as cuBLAS advises for Hopper.
const WORKSPACE_BYTES: usize = 32 << 20;

/// `CUBLAS_OP_T`, which the bindings have beside the older library only.
const TRANSPOSED: i32 = 1;

/// Shapes that are remembered at a time.
const MAX_PLANS: usize = 8192;

/// What is known of a product's shape.
#[derive(Debug)]
struct Plan {
    weight: sys::cublasLtMatrixLayout_t,
    x: sys::cublasLtMatrixLayout_t,
    out: sys::cublasLtMatrixLayout_t,
    algorithm: sys::cublasLtMatmulAlgo_t,
}

/// Multiplies in one stream.
#[derive(Debug)]
pub(super) struct Products {
    handle: sys::cublasLtHandle_t,
    /// `weight^T x` in cuBLAS's view, whose matrices are column by column.
    operation: sys::cublasLtMatmulDesc_t,
    preference: sys::cublasLtMatmulPreference_t,
    workspace: Address,
    stream: CUstream,
    half: Half,
    /// By rows, inputs, outputs, and whether they are wide.
    plans: HashMap<(usize, usize, usize, bool), Plan>,
}

impl Products {
    pub(super) fn new(half: Half, stream: CUstream) -> Result<Self, Error> {
        // SAFETY: only looks for the library.
        if !unsafe { sys::is_culib_present() } {
            return Err(Error::Device(
                "products on a GPU are computed by libcublasLt of CUDA 12 or 13, which was not found: install it, or name its \
                 folder in LD_LIBRARY_PATH"
                    .into(),
            ));
        }
        // SAFETY: what is in it is nobody's but the algorithms'.
        let workspace = unsafe { driver::malloc_sync(WORKSPACE_BYTES) };
        let workspace = workspace.map_err(super::failed("take the workspace of products"))?;
        let made = || {
            let handle = result::create_handle()?;
            let operation = result::create_matmul_desc(
                cublasComputeType_t::CUBLAS_COMPUTE_32F,
                cudaDataType::CUDA_R_32F,
            )?;
            let preference = result::create_matmul_pref()?;
            let transposed: i32 = TRANSPOSED;
            // SAFETY: both were just made, and the values have the sizes that are told.
            unsafe {
                result::set_matmul_desc_attribute(
                    operation,
                    cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSA,
                    std::ptr::from_ref(&transposed).cast(),
                    size_of_val(&transposed),
                )?;
                result::set_matmul_pref_attribute(
                    preference,
                    cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                    std::ptr::from_ref(&WORKSPACE_BYTES).cast(),
                    size_of_val(&WORKSPACE_BYTES),
                )?;
            }
            Ok((handle, operation, preference))
        };
        let (handle, operation, preference) = made().map_err(failed)?;
        Ok(Self { handle, operation, preference, workspace, stream, half, plans: HashMap::new() })
    }

    /// Asks for a product.
    pub(super) fn multiply(&mut self, product: &Product) -> Result<(), Error> {
        let key = (product.num_rows, product.in_features, product.out_features, product.wide);
        if !self.plans.contains_key(&key) {
            if self.plans.len() >= MAX_PLANS {
                self.forget();
            }
            let plan = self.plan(product).map_err(failed)?;
            self.plans.insert(key, plan);
        }
        let plan = &self.plans[&key];
        let (one, zero) = (1.0_f32, 0.0_f32);
        let at = |address: Address| address as *mut c_void;
        // SAFETY: the layouts are those of the matrices, which who calls has; the scales are read before the call returns.
        unsafe {
            result::matmul(
                self.handle,
                self.operation,
                std::ptr::from_ref(&one).cast(),
                std::ptr::from_ref(&zero).cast(),
                at(product.weight),
                plan.weight,
                at(product.x),
                plan.x,
                at(product.out),
                plan.out,
                at(product.out),
                plan.out,
                &raw const plan.algorithm,
                at(self.workspace),
                WORKSPACE_BYTES,
                self.stream.cast(),
            )
        }
        .map_err(failed)
    }

    /// Row by row is column by column of the transposed matrix.
    fn plan(&self, product: &Product) -> Result<Plan, CublasError> {
        let half = match self.half {
            Half::Bf16 => cudaDataType::CUDA_R_16BF,
            Half::Fp16 => cudaDataType::CUDA_R_16F,
        };
        let wide = if product.wide { cudaDataType::CUDA_R_32F } else { half };
        let layout = |kind, row_len: usize, num_rows: usize| {
            result::create_matrix_layout(kind, row_len as u64, num_rows as u64, row_len as i64)
        };
        let weight = layout(half, product.in_features, product.out_features)?;
        let x = layout(half, product.in_features, product.num_rows)?;
        let out = layout(wide, product.out_features, product.num_rows)?;
        // SAFETY: all of them were made and are there.
        let found = unsafe {
            result::get_matmul_algo_heuristic(
                self.handle,
                self.operation,
                weight,
                x,
                out,
                out,
                self.preference,
            )
        }?;
        Ok(Plan { weight, x, out, algorithm: found.algo })
    }

    fn forget(&mut self) {
        for (_, plan) in self.plans.drain() {
            for layout in [plan.weight, plan.x, plan.out] {
                // SAFETY: nobody uses it any more. There is nothing to do where it fails.
                let _given_back = unsafe { result::destroy_matrix_layout(layout) };
            }
        }
    }

    /// Gives everything back.
    pub(super) fn close(&mut self) {
        self.forget();
        // SAFETY: nobody uses them any more. There is nothing to do where it fails.
        unsafe {
            let _given_back = result::destroy_matmul_pref(self.preference);
            let _given_back = result::destroy_matmul_desc(self.operation);
            let _given_back = result::destroy_handle(self.handle);
            let _given_back = driver::free_sync(self.workspace);
        }
    }
}

fn failed(error: CublasError) -> Error {
    Error::Device(format!("the GPU could not multiply: {error}"))
}
